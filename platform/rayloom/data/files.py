"""Data files as chunks: byte ranges that can be read by themselves, with the number of rows in each.

A JSON-lines file is cut at newlines; a JSON file that holds one list is cut between its elements. So any row is found
by reading its chunk alone, whichever worker needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayloom.errors import RequestError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Bytes `start..stop` of a file: `rows` rows, the first of which is row `first_row` of the file (from 0).

    `first_line` is the line (from 1) on which the chunk starts.
    """

    path: str
    start: int
    stop: int
    rows: int
    first_row: int
    first_line: int


def index_file(path: str, chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
    """Cut a `.jsonl` or `.json` file into chunks of about `chunk_bytes`.

    Raises:
        RequestError: the file is missing, a folder, of another kind, empty, or (`.json`) not a list of objects.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise RequestError(f"{path}: is a folder; name a .jsonl or .json file")
    if not file.exists():
        raise RequestError(f"{path}: no such data file")
    if file.suffix not in (".jsonl", ".json"):
        raise RequestError(f"{path}: cannot read {file.suffix or 'a file without an ending'}; give .jsonl or .json")
    try:
        chunks = list(_cut_lines(file, chunk_bytes) if file.suffix == ".jsonl" else _cut_list(file, chunk_bytes))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not chunks:
        raise RequestError(f"{path}: is empty; a data set needs at least one row")
    return chunks


def read_rows(chunk: Chunk, rows: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
    """Parse the given rows (numbers within the chunk, in any order) of one chunk.

    Returns:
        For each row the place to name in messages (`file:line: row N`) and its columns.

    Raises:
        RequestError: a row that is not a JSON object, or a file that changed or vanished since it was indexed.
    """
    try:
        with open(Path(chunk.path).expanduser(), "rb") as file:
            file.seek(chunk.start)
            data = file.read(chunk.stop - chunk.start)
    except OSError as error:
        raise RequestError(f"{chunk.path}: cannot be read any more: {error.strerror or error}") from None
    if chunk.path.endswith(".json"):
        try:
            elements = json.loads(b"[" + data + b"]")
        except ValueError:
            elements = []
        found = [(f"{chunk.path}: row {chunk.first_row + number + 1}", value) for number, value in enumerate(elements)]
    else:
        lines = [(number, line) for number, line in enumerate(data.split(b"\n"), chunk.first_line) if line.strip()]
        found = [
            (f"{chunk.path}:{number}: row {chunk.first_row + index + 1}", line)
            for index, (number, line) in enumerate(lines)
        ]
    if len(found) != chunk.rows:
        raise RequestError(f"{chunk.path}: changed while the job was reading it; start the job again")
    return [_parse(*found[row]) for row in rows]


def _parse(place: str, row: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except UnicodeDecodeError as error:
            raise RequestError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start + 1})") from None
        except json.JSONDecodeError as error:
            raise RequestError(
                f"{place}: not JSON: {error.msg} at column {error.colno}; a .jsonl file holds one JSON object a line"
            ) from None
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{place}: cannot be read as JSON: {error}") from None
    if not isinstance(row, dict):
        raise RequestError(f"{place}: is a {type(row).__name__}, not a JSON object with named columns")
    return place, row


def _cut_lines(file: Path, chunk_bytes: int) -> Iterator[Chunk]:
    row, line, start = 0, 1, 0
    with file.open("rb") as handle:
        while data := handle.read(chunk_bytes):
            data += handle.readline()  # up to the next newline
            rows = sum(1 for text in data.split(b"\n") if text.strip())
            if rows:
                yield Chunk(str(file), start, start + len(data), rows, row, line)
            row, line, start = row + rows, line + data.count(b"\n"), start + len(data)


def _cut_list(file: Path, chunk_bytes: int) -> Iterator[Chunk]:
    """One pass over a JSON list. A list cannot be cut without reading what is before: prefer `.jsonl`."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
        position = _skip(text, 1 if text.startswith("\ufeff") else 0)  # behind a byte order mark, as Windows writes
        if position == len(text):
            return
        if text[position] != "[":
            raise RequestError(f"{file}: a .json data file holds one list of objects; name it .jsonl if one a line")
        decoder = json.JSONDecoder()
        position = _skip(text, position + 1)
        begin, row, rows, start = position, 0, 0, len(text[:position].encode())
        line = text.count("\n", 0, begin) + 1
        while text[position : position + 1] != "]":
            _, position = decoder.raw_decode(text, position)
            rows += 1
            end, position = position, _skip(text, position)
            if text[position : position + 1] == ",":
                position = _skip(text, position + 1)
                if position - begin >= chunk_bytes:
                    size = len(text[begin:position].encode())
                    stop = start + len(text[begin:end].encode())
                    yield Chunk(str(file), start, stop, rows, row, line)
                    line += text.count("\n", begin, position)
                    begin, row, rows, start = position, row + rows, 0, start + size
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
        if rows:
            stop = start + len(text[begin:end].encode())
            yield Chunk(str(file), start, stop, rows, row, line)
        position = _skip(text, position + 1)
        if position < len(text):
            raise json.JSONDecodeError("something stands behind the list", text, position)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{file}:{line}: not UTF-8 text ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file}: cannot be read as JSON: {error}") from None


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
