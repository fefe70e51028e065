"""Rows of a located file: how many a chunk has, some of them, and where one stands."""

from __future__ import annotations

from collections.abc import Sequence

from rayloom.data.files.data_file import DataFile, RawRow
from rayloom.data.files.lines import count_lines, line_place, read_lines, sample_lines
from rayloom.data.files.locate import lines_source

_COUNTED_CHUNKS = 8
_SAMPLED_FILES = 8


def count_rows(file: DataFile, chunk: int) -> int:
    """Rows of one chunk, 0 included.

    Raises:
        RequestError: the file changed or cannot be read any more.
    """
    return count_lines(file, lines_source(file), chunk) if file.chunk_rows is None else file.chunk_rows[chunk]


def read_rows(file: DataFile, chunk: int, rows: Sequence[int]) -> list[RawRow]:
    """The given rows (numbers within the chunk, in any order) of one chunk.

    What is wrong with a single row is that row's `fault`.

    Raises:
        RequestError: the file changed, cannot be read any more, or a whole chunk of it cannot be decoded.
    """
    if not rows:
        return []
    if file.kind in ("jsonl", "txt"):
        return read_lines(file, lines_source(file), chunk, rows)
    from rayloom.data.files.tables import read_table_rows

    return read_table_rows(file, chunk, rows)


def place(file: DataFile, chunk: int, row: int) -> str:
    """Where a row stands, for messages: `file:line: row N` in files of lines, `file: row N` in others.

    Reads a file of lines from its beginning: for faults only.
    """
    if file.chunk_rows is not None:
        return f"{file.address}: row {sum(file.chunk_rows[:chunk]) + row + 1}"
    line, number = line_place(file, lines_source(file), chunk, row)
    if file.unpack and file.unpack.partition(".")[0] in ("json", "csv", "tsv"):
        return f"{file.address}: row {number}"  # the lines are not those of the user's file
    return f"{file.address}:{line}: row {number}"


def estimate_rows(files: Sequence[DataFile]) -> int:
    """About how many rows files have: exact where they tell or are small, else from the rows at the beginning of some.

    The same files give the same number; it is at least 1 where there is any row.

    Raises:
        RequestError: a file changed or cannot be read any more.
    """
    known = sum(sum(file.chunk_rows) for file in files if file.chunk_rows is not None)
    others = [file for file in files if file.chunk_rows is None]
    if sum(file.chunks for file in others) <= _COUNTED_CHUNKS:
        return known + sum(count_rows(file, chunk) for file in others for chunk in range(file.chunks))
    step = -(-len(others) // _SAMPLED_FILES)
    samples = [sample_lines(file, lines_source(file), 0) for file in others[::step]]
    rows, size = (sum(column) for column in zip(*samples, strict=True))
    # Files that begin with a megabyte of blank lines have a row somewhere, surely not many.
    return known + max(1, sum(file.size for file in others) * rows // max(size, 1))
