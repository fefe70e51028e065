"""Parquet and Arrow files: rows in named columns, with an index that tells what lies where."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayloom.data.files.access import RangeReader, Source, read_range, reason
from rayloom.data.files.cache import RECENTLY_READ
from rayloom.data.files.data_file import CHUNK_ROWS, DataFile, Part, RawRow
from rayloom.errors import RequestError

WHOLE_GROUP_BYTES = 256 << 20
"""A Parquet row group up to this size is decoded as a whole and kept; of a larger one only the rows of a chunk."""

_HEADER_BYTES = 4 << 10  # of an Arrow message's metadata: read with its length
_FILE_MAGIC = b"ARROW1\x00\x00"
_CONTINUES = b"\xff\xff\xff\xff"
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # the kinds of messages in Arrow's `Message.fbs`


def parquet_parts(source: Source) -> tuple[Part, ...]:
    """The chunks of a Parquet file, from its footer: parts of row groups, in order.

    Raises:
        RequestError: the footer cannot be read.
    """
    footer = _footer(source)
    sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    return tuple(
        Part(first, min(CHUNK_ROWS, rows - first), group)
        for group, rows in enumerate(sizes)
        for first in range(0, rows, CHUNK_ROWS)
    )


def read_table_rows(file: DataFile, chunk: int, rows: Sequence[int]) -> list[RawRow]:
    """The given rows of one chunk, as plain Python values.

    Raises:
        RequestError: the chunk cannot be decoded.
    """
    read = _parquet_chunk if file.kind == "parquet" else _arrow_chunk
    return _to_rows(read(file, chunk).take(pa.array(rows, pa.int64())))


def _to_rows(table: Any) -> list[RawRow]:
    try:
        return [RawRow(row, None) for row in table.to_pylist()]
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if len(table) == 1:
            return [RawRow(None, f"cannot be read: {reason(error)}")]
        return [row for number in range(len(table)) for row in _to_rows(table.slice(number, 1))]


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _footer(source: Source) -> Any:
    def read() -> tuple[Any, int]:
        reader = RangeReader(source)
        try:
            footer = pq.read_metadata(reader)
        except Exception as error:
            raise reader.failure or RequestError(f"{source.address}: not a Parquet file: {reason(error)}") from None
        return footer, 4 * footer.serialized_size

    return RECENTLY_READ.get((source, "footer"), read)


def _parquet_chunk(file: DataFile, chunk: int) -> Any:
    part, footer = file.parts[chunk], _footer(file.source)
    whole = footer.row_group(part.group).total_byte_size <= WHOLE_GROUP_BYTES
    key = (file.source, "group", part.group, None if whole else part.start)

    def read() -> tuple[Any, int]:
        reader = RangeReader(file.source)
        try:
            # Reading ahead would hold all the bytes of a group of which only some are wanted at a time.
            parquet = pq.ParquetFile(
                reader, metadata=footer, pre_buffer=whole, **({} if whole else {"buffer_size": 1 << 20})
            )
            if whole:
                table = parquet.read_row_group(part.group, use_threads=False)
            else:
                table = _cut(parquet.iter_batches(CHUNK_ROWS, [part.group], use_threads=False), part)
        except Exception as error:  # whatever a broken file makes the library say
            where = f"{file.address}: row group {part.group + 1} of {footer.num_row_groups}"
            raise reader.failure or RequestError(f"{where} cannot be read: {reason(error)}") from None
        return table, table.nbytes

    table = RECENTLY_READ.get(key, read)
    return table.slice(part.start, part.length) if whole else table


def _cut(batches: Iterator[Any], part: Part) -> Any:
    """The rows of a chunk from the batches of its row group. What comes after it is not decoded."""
    found, first = [], 0
    for batch in batches:
        begin, end = max(part.start - first, 0), min(part.start + part.length - first, len(batch))
        if begin < end:
            found.append(batch.slice(begin, end - begin))
        first += len(batch)
        if first >= part.start + part.length:
            break
    return pa.Table.from_batches(found)


# --- Arrow -----------------------------------------------------------------------------------------------------------
# Both of its formats, stream and file, hold the same messages: the schema, dictionaries, record batches. Their metadata
# tell the rows and the length of each, so one walk over the metadata finds all batches without reading them.


def arrow_parts(source: Source) -> tuple[tuple[Part, ...], tuple[int, ...], tuple[Part, ...]]:
    """The record batches of an Arrow file that hold rows, the rows of each, and the messages that go before them.

    Raises:
        RequestError: it is not an Arrow file, or it ends early.
    """
    parts, rows, headers = [], [], []
    position = len(_FILE_MAGIC) if read_range(source, 0, len(_FILE_MAGIC)) == _FILE_MAGIC else 0
    try:
        while position < source.size:
            head = read_range(source, position, position + _HEADER_BYTES)
            if head[:4] != _CONTINUES:
                raise ValueError("no message begins here")
            (length,) = struct.unpack_from("<i", head, 4)
            if length == 0:  # the end; in the file format a footer follows
                break
            if 8 + length > len(head):
                head = read_range(source, position, position + 8 + length)
            kind, size, body = _message(head[8 : 8 + length])
            part = Part(position, 8 + length + body)
            if position + part.length > source.size:
                raise ValueError("the file ends within a message")
            if kind == _BATCH and size:
                parts.append(part)
                rows.append(size)
            elif kind in (_SCHEMA, _DICTIONARY):
                headers.append(part)
            position += part.length
        if not headers:
            raise ValueError("it has no schema")
    except (ValueError, struct.error, IndexError) as error:
        raise RequestError(f"{source.address}: not an Arrow file: {error} (at byte {position})") from None
    return tuple(parts), tuple(rows), tuple(headers)


def _message(data: bytes) -> tuple[int, int, int]:
    """Of a message's metadata (a FlatBuffer): its kind, the rows of its record batch, the bytes of its body."""

    def field(table: int, number: int) -> int | None:
        """Where a table's field lies."""
        layout = table - int(struct.unpack_from("<i", data, table)[0])
        entry = 4 + 2 * number
        if entry >= struct.unpack_from("<H", data, layout)[0]:
            return None
        offset = int(struct.unpack_from("<H", data, layout + entry)[0])
        return table + offset if offset else None

    def value(form: str, table: int, number: int) -> int:
        at = field(table, number)
        return 0 if at is None else int(struct.unpack_from(form, data, at)[0])

    root = int(struct.unpack_from("<I", data, 0)[0])
    kind, body, header = value("<B", root, 1), value("<q", root, 3), field(root, 2)
    if header is None or body < 0:
        raise ValueError("a message without content")
    rows = value("<q", header + int(struct.unpack_from("<I", data, header)[0]), 0) if kind == _BATCH else 0
    return kind, rows, body


def _arrow_chunk(file: DataFile, chunk: int) -> Any:
    part = file.parts[chunk]

    def read() -> tuple[Any, int]:
        # A stream of its own: the schema, the dictionaries so far, and the one record batch.
        messages = [*(header for header in file.headers if header.start < part.start), part]
        data = b"".join(read_range(file.source, each.start, each.start + each.length) for each in messages)
        try:
            batch = pa.ipc.open_stream(data).read_next_batch()
            batch.validate()
        except (pa.ArrowException, OSError, StopIteration) as error:
            where = f"{file.address}: record batch {chunk + 1} of {file.chunks}"
            raise RequestError(f"{where} cannot be read: {reason(error)}") from None
        if len(batch) != file.chunk_rows[chunk]:  # type: ignore[index]  # always known of an Arrow file
            raise RequestError(f"{file.address}: changed while the job was reading it; start the job again")
        return batch, len(data)

    return RECENTLY_READ.get((file.source, "batch", part.start), read)
