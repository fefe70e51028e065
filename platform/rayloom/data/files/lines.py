"""Files of lines: a chunk is the lines that start in its bytes, found by arithmetic.

Only a newline ends a line. Blank lines are not rows. Whoever reads a chunk reads its bytes and on to the end of the
last line that starts there, so every line belongs to one chunk, and no other chunk is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rayloom.data.files.access import Source, read_range
from rayloom.data.files.cache import RECENTLY_READ
from rayloom.data.files.data_file import MAX_ROW_BYTES, DataFile, RawRow

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_READ_ON = 16 << 10  # asked for with the chunk, as its last line nearly always goes on
_LONGEST_STEP = 8 << 20
_SCAN_BYTES = 8 << 20
_LINE_OVERHEAD = 48  # bytes of memory that a line takes beyond its text

Line = bytes | None
"""A line without its newline; None: it is longer than `MAX_ROW_BYTES`."""


def count_lines(file: DataFile, source: Source, chunk: int) -> int:
    """Rows of one chunk. Reads the chunk."""
    return len(_rows(file, source, chunk))


def read_lines(file: DataFile, source: Source, chunk: int, rows: Sequence[int]) -> list[RawRow]:
    """The given rows of one chunk."""
    lines = _rows(file, source, chunk)
    parse = parse_json if file.kind == "jsonl" else parse_text
    return [parse(lines[row]) for row in rows]


def line_place(file: DataFile, source: Source, chunk: int, row: int) -> tuple[int, int]:
    """The line and the row in the whole file, both from 1. Reads all that is before."""
    lines = rows = 0
    begin = chunk * file.chunk_bytes
    for start in range(0, begin, _SCAN_BYTES):
        before = lines_between(source, start, min(start + _SCAN_BYTES, begin))
        lines, rows = lines + len(before), rows + sum(map(_is_row, before))
    inside = lines_between(source, begin, begin + file.chunk_bytes)
    index = [number for number, line in enumerate(inside) if _is_row(line)][row]
    return lines + index + 1, rows + row + 1


def sample_lines(file: DataFile, source: Source, chunk: int) -> tuple[int, int]:
    """Rows of one chunk, and the bytes that they take."""
    lines = _rows(file, source, chunk)
    return len(lines), sum(MAX_ROW_BYTES if line is None else len(line) + 1 for line in lines)


def lines_between(source: Source, start: int, stop: int) -> list[Line]:
    """The lines, blank ones too, that start in the bytes `start..stop`."""
    stop = min(stop, source.size)
    behind = max(start - 1, 0)  # a line starts at `start` if the byte before it is a newline
    data = read_range(source, behind, stop + _READ_ON)
    own = stop - behind
    if start:
        newline = data.find(b"\n", 0, max(own - 1, 0))
        if newline < 0:
            return []
        data, own = data[newline + 1 :], own - newline - 1
    if data[own - 1 : own] == b"\n":
        lines: list[Line] = [*data[: own - 1].split(b"\n")]
    elif (end := data.find(b"\n", own)) >= 0:
        lines = [*data[:end].split(b"\n")]
    else:
        *whole, last = data.split(b"\n")
        lines = [*whole, _read_on(source, stop + _READ_ON, last)]
    if not start and lines and lines[0] is not None:
        lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
    return lines


def parse_json(line: Line) -> RawRow:
    """A line as a row: a JSON object, or why it is none."""
    if line is None:
        return _too_long()
    try:
        text = line.decode()
        row: Any = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return RawRow(None, f"not UTF-8 text ({error.reason} at byte {error.start + 1})")
    except UnicodeEncodeError:
        return RawRow(None, "holds half a character: an escape \\ud800 to \\udfff without its other half")
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")  # of "Unterminated string starting at"
        return RawRow(None, f"not JSON: {what} at column {error.colno}; a .jsonl file holds one JSON object a line")
    except (ValueError, RecursionError) as error:
        return RawRow(None, f"cannot be read as JSON: {error}")
    if not isinstance(row, dict):
        return RawRow(None, f"is a {type(row).__name__}, not a JSON object with named columns")
    return RawRow(row, None)


def parse_text(line: Line) -> RawRow:
    """A line as a document: its text in the column `text`, or why there is none."""
    if line is None:
        return _too_long()
    try:
        return RawRow({"text": line.removesuffix(b"\r").decode()}, None)
    except UnicodeDecodeError as error:
        return RawRow(None, f"not UTF-8 text ({error.reason} at byte {error.start + 1})")


def _too_long() -> RawRow:
    return RawRow(None, f"the line is longer than {MAX_ROW_BYTES >> 20} MiB, the most that is read as one row")


def _rows(file: DataFile, source: Source, chunk: int) -> list[Line]:
    def read() -> tuple[list[Line], int]:
        start = chunk * file.chunk_bytes
        lines = [line for line in lines_between(source, start, start + file.chunk_bytes) if _is_row(line)]
        return lines, sum(_LINE_OVERHEAD + len(line or b"") for line in lines)

    return RECENTLY_READ.get((source, file.chunk_bytes, chunk), read)


def _is_row(line: Line) -> bool:
    return line is None or bool(line.strip())


def _read_on(source: Source, position: int, begun: bytes) -> Line:
    """The whole of a line of which `begun` is read, up to `position`: in steps that grow, for a line may be long."""
    pieces, length, step = [begun], len(begun), 64 << 10
    while position < source.size and length <= MAX_ROW_BYTES:
        piece = read_range(source, position, position + step)
        position, step = position + len(piece), min(2 * step, _LONGEST_STEP)
        end = piece.find(b"\n")
        pieces.append(piece if end < 0 else piece[:end])
        length += len(pieces[-1])
        if end >= 0:
            break
    return None if length > MAX_ROW_BYTES else b"".join(pieces)
