"""Log-probabilities of rows under a reference, on disk.

    <folder>/<part>.parquet   some rows each: `key`, `first` and `second`
    <folder>/<mark>.json      written when the rows of a job are all there (`rayloom.stages.reference`)

A row is known by a hash of its tokens, positions and labels, so the store may hold the rows of many jobs. Parts are
named by their rows and appear whole or not at all: jobs may write into one store at a time, and what one has computed
before it broke off is there for the next.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayloom.errors import JobError

LAYOUT = 1
"""Raised when what stands in a store, or how it is computed, changes."""
_COLUMNS = ("input_ids", "position_ids", "labels")


def row_keys(table: pa.Table) -> np.ndarray:
    """(rows,) uint64, of the rows of a table of the stream."""
    keys = np.empty(table.num_rows, dtype=np.uint64)
    columns = [table[name] for name in _COLUMNS]
    for row in range(table.num_rows):
        digest = hashlib.blake2b(digest_size=8)
        for column in columns:
            digest.update(column[row].values.to_numpy(zero_copy_only=False).astype(np.int32).tobytes())
        keys[row] = int.from_bytes(digest.digest(), "little")
    return keys


class ReferenceTable:
    """Keys and, for each, the summed log-probabilities of a row's two sequences, in memory: 16 bytes a row."""

    def __init__(self) -> None:
        self._keys = np.empty(0, dtype=np.uint64)  # rising
        self._sums = np.empty((0, 2), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._keys)

    def has(self, keys: np.ndarray) -> np.ndarray:
        """(keys,) bool."""
        return self._keys[self._places(keys)] == keys if len(self._keys) else np.zeros(len(keys), dtype=bool)

    def sums(self, keys: np.ndarray) -> np.ndarray:
        """(keys, 2) float32; nan for a sequence that a row has not.

        Raises:
            KeyError: some are not there.
        """
        if not self.has(keys).all():
            raise KeyError(f"{(~self.has(keys)).sum()} of {len(keys)} rows")
        return self._sums[self._places(keys)] if len(keys) else np.empty((0, 2), dtype=np.float32)

    def add(self, keys: np.ndarray, sums: np.ndarray) -> None:
        """Take in more rows; of one that is there already the value stays."""
        self._keys, first = np.unique(np.concatenate([self._keys, keys]), return_index=True)
        self._sums = np.concatenate([self._sums, sums])[first]

    def _places(self, keys: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._keys, keys).clip(max=max(0, len(self._keys) - 1))


def read_table(folder: Path) -> ReferenceTable:
    """All rows of a store; none where there is no store.

    Raises:
        JobError: the store is damaged.
    """
    table = ReferenceTable()
    parts = sorted(folder.glob("*.parquet"))
    try:
        found = [pq.read_table(part) for part in parts]
    except (OSError, pa.ArrowException) as error:
        raise JobError(
            f"stage.reference: {folder} cannot be read: {error}; delete it, and it is computed again"
        ) from None
    if found:
        rows = pa.concat_tables(found)
        sums = np.stack([rows[name].to_numpy() for name in ("first", "second")], axis=1)
        table.add(rows["key"].to_numpy(), sums)
    return table


def write_part(folder: Path, keys: np.ndarray, sums: np.ndarray) -> None:
    """Add rows to a store.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest()
    partial = folder / f"{name}.{os.getpid()}.partial"
    table = pa.table({"key": pa.array(keys, pa.uint64()), "first": sums[:, 0], "second": sums[:, 1]})
    pq.write_table(table, partial)
    partial.replace(folder / f"{name}.parquet")


def mark_whole(folder: Path, mark: str, facts: dict[str, Any]) -> None:
    """Declare that the rows of the jobs that have this mark are all there."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{mark}.{os.getpid()}.partial"
    partial.write_text(json.dumps(facts, indent=2) + "\n")
    partial.replace(folder / f"{mark}.json")


def is_marked(folder: Path, mark: str) -> bool:
    """Whether `mark_whole` has declared it."""
    return (folder / f"{mark}.json").exists()
