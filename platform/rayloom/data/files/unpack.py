"""Formats that cannot be read from the middle: turned once into lines, in this machine's cache folder.

A `.json` list, `.csv` and `.tsv` (a quoted text may hold newlines), and whatever is compressed. The result has a name
made from the address and the fingerprint of what it came from, and appears whole or not at all. It is a pure function
of the file, so another node makes the same one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayloom.cache import cache_dir, only_one
from rayloom.data.files.access import RangeReader, Source, find_source, reason
from rayloom.data.files.data_file import MAX_ROW_BYTES
from rayloom.data.files.json_list import list_elements
from rayloom.errors import RequestError

_BLOCK_BYTES = 1 << 20  # of unpacked text at a time
_REQUEST_BYTES = 4 << 20  # of the file at a time: each may be a request to a remote store
_COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}
_NAMES = {",": "CSV", "\t": "TSV"}


def unpacked(source: Source, how: str) -> Source:
    """The lines that a file becomes; unpacked first where this machine does not have them yet.

    Args:
        how: The file's endings: `json`, `csv`, `tsv`, or one of these, `jsonl` or `txt` with `.gz` or `.zst`.

    Raises:
        RequestError: the file cannot be read or is not what its ending says, or the cache folder cannot be written.
    """
    kind = how.partition(".")[0]
    name = hashlib.blake2b(f"{source.address} {source.fingerprint}".encode(), digest_size=16).hexdigest()
    path = cache_dir() / "data" / f"{name}.{'txt' if kind == 'txt' else 'jsonl'}"
    try:
        if not path.exists():
            with only_one(path.with_suffix(".lock"), f"the lines of {source.address}"):
                if not path.exists():
                    _write(path, _convert(source, how))
        return find_source(str(path), source.retries)
    except OSError as error:
        raise RequestError(f"{source.address}: cannot be unpacked into {path.parent}: {reason(error)}") from None


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with open(descriptor, "wb") as handle:
            for piece in pieces:
                handle.write(piece)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _convert(source: Source, how: str) -> Iterable[bytes]:
    kind, _, compression = how.partition(".")
    blocks = _decompressed(source, _COMPRESSIONS[compression]) if compression else _plain(source)
    if kind == "json":
        return list_elements(source.address, blocks)
    if kind in ("csv", "tsv"):
        return table_lines(source.address, blocks, "," if kind == "csv" else "\t")
    return blocks


def _plain(source: Source) -> Iterator[bytes]:
    reader = RangeReader(source)
    while block := reader.read(_REQUEST_BYTES):
        yield block


def _decompressed(source: Source, compression: str) -> Iterator[bytes]:
    reader = RangeReader(source)
    if not source.size:
        return
    stream = pa.CompressedInputStream(pa.PythonFile(io.BufferedReader(reader, _REQUEST_BYTES), "r"), compression)
    while True:
        try:
            block = stream.read(_BLOCK_BYTES)
        except (OSError, pa.ArrowException, RequestError) as error:
            what = f"not a whole {compression} file: {reason(error)}"
            raise reader.failure or RequestError(f"{source.address}: {what}") from None
        if not block:
            return
        yield block


def table_lines(address: str, blocks: Iterable[bytes], delimiter: str) -> Iterator[bytes]:
    """The rows of a table with a header, as JSON lines: every value is text, an empty one is "".

    Raises:
        RequestError: no header, a row with more or fewer values, a quote that does not end, text that is not UTF-8.
    """
    # The module's own limit, 128 KiB a value, is for all of the process; nothing in Rayloom relies on it.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    reader = csv.reader(_text_lines(address, blocks), delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    begin = 1
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise RequestError(f"{address}:{begin}: row {number + 1}: not {_NAMES[delimiter]}: {error}") from None
        if values is None:
            return
        if values and not header:
            header = _check_header(address, values)
        elif values:
            number += 1
            if len(values) != len(header):
                what = f"has {len(values)} values where the header names {len(header)} columns"
                raise RequestError(f"{address}:{begin}: row {number}: {what}")
            row: dict[str, Any] = dict(zip(header, values, strict=True))
            yield json.dumps(row, ensure_ascii=False).encode() + b"\n"
        begin = reader.line_num + 1


def _check_header(address: str, names: list[str]) -> list[str]:
    for name in names:
        if not name.strip():
            raise RequestError(f"{address}: the header has a column without a name; the first line names the columns")
        if names.count(name) > 1:
            raise RequestError(f"{address}: the header names the column {name!r} twice")
    return names


def _text_lines(address: str, blocks: Iterable[bytes]) -> Iterator[str]:
    """Lines with their newlines, as `csv` wants them."""
    for number, line in enumerate(_lines(address, blocks), 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{address}:{number}: not UTF-8 text ({error.reason})") from None


def _lines(address: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if len(rest) > MAX_ROW_BYTES:
            raise RequestError(f"{address}: has a line longer than {MAX_ROW_BYTES >> 20} MiB")
    if rest:
        yield rest
