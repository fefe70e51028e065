"""What a data file is: chunks that can be read by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rayloom.data.files.access import Source

CHUNK_BYTES = 1 << 20
"""Bytes of a chunk of lines, in files small enough for `MAX_CHUNKS`."""
MAX_CHUNKS = 1 << 16
CHUNK_ROWS = 8192
"""Most rows of a chunk of a Parquet file."""
MAX_ROW_BYTES = 64 << 20
"""Longest line or list element that is read as a row."""

Kind = Literal["jsonl", "txt", "parquet", "arrow"]


@dataclass(frozen=True)
class Part:
    """Where a chunk of a Parquet or Arrow file lies."""

    start: int
    """Parquet: its first row in the row group. Arrow: the byte where the record batch's message begins."""
    length: int
    """Parquet: its rows. Arrow: the message's bytes."""
    group: int = 0
    """Parquet: the row group."""


@dataclass(frozen=True)
class DataFile:
    """A file that was located: small, and all that is needed to read any of its chunks on any node."""

    address: str
    """The path or address that the user knows."""
    kind: Kind
    """How the bytes of `path` are read."""
    path: str
    """What is opened: the same as `address`, or the lines that were unpacked from it (on this machine; another
    unpacks them into its own cache folder)."""
    size: int
    """Bytes of `path`."""
    chunks: int
    chunk_rows: tuple[int, ...] | None
    """Rows of each chunk where the file tells without a scan, else None."""
    fingerprint: str
    """Changes when the content does (see `Source.fingerprint`)."""
    source: Source
    """The file at `address`."""
    chunk_bytes: int = CHUNK_BYTES
    """Lines: chunk k is the lines that start in the bytes `k * chunk_bytes .. (k + 1) * chunk_bytes`."""
    parts: tuple[Part, ...] = ()
    """Parquet and Arrow: where each chunk lies."""
    headers: tuple[Part, ...] = ()
    """Arrow: the messages with the schema and the dictionaries."""
    unpack: str | None = None
    """How `path` was made from `address`: the endings, such as `json` or `jsonl.gz`. None: it was not."""


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in the file."""

    columns: dict[str, Any] | None
    fault: str | None
    """Why the row cannot be read; then it has no columns."""
