"""Prepared data: the tokens of every row of a data set, so that no job has to make them again.

    <folder>/<set>-<key>/00000.parquet ...   row groups, one for each chunk of the set, in order
    <folder>/<set>-<key>/complete.json       written last; without it there is no store

The key is a hash of everything that changes the tokens: the files, the columns' meaning, the template, the tokenizer,
the cutoff, the rules of the mask, the versions. So a store that does not fit is never found. The order of the stream
does not depend on whether there is one: a row stays in its chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayloom import __version__
from rayloom.data.encoding import Encoding
from rayloom.data.plan import DataSet
from rayloom.errors import RequestError

LAYOUT = 4
"""Raised when what stands in a store, or how rows become tokens, changes."""
CHUNKS_PER_FILE = 16
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "cut": pa.int32(),
        "border": pa.int32(),  # `Encoding.border`
        "desirable": pa.int8(),  # `rayloom.data.rows.judgement` of `Encoding.desirable`
        "answer": pa.string(),  # `Encoding.answer`
        "counter": pa.int8(),  # which of `rayloom.data.rows.COUNTERS` it adds to, where there are no tokens; else -1
        "side": pa.float64(),  # 0 to 1; a row below `data.held_out` is not trained on
    }
)
_COMPLETE = "complete.json"
_NO_ROW = pa.Table.from_pylist([{"cut": 0, "border": 0, "desirable": -1, "counter": 0, "side": 0.0}], schema=SCHEMA)


def store_folder(folder: Path, data_set: DataSet, encoder_key: str, cutoff: int) -> Path:
    """Where the prepared tokens of a set are, or would be.

    Args:
        encoder_key: changes with the template, the tokenizer and the rules of the mask.
    """
    versions = [LAYOUT, __version__, version("transformers"), version("tokenizers")]
    what = json.dumps([data_set.fingerprint, encoder_key, cutoff, versions])
    name = re.sub(r"[^A-Za-z0-9._-]", "_", data_set.name)
    return folder / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def find_store(folder: Path, data_set: DataSet, encoder_key: str, cutoff: int) -> str | None:
    """The folder of a whole store that fits; None: there is none."""
    found = store_folder(folder, data_set, encoder_key, cutoff)
    return str(found) if (found / _COMPLETE).exists() else None


def files_of(data_set: DataSet) -> int:
    """How many files a set's store has."""
    return -(-data_set.chunks // CHUNKS_PER_FILE)


def write_file(folder: Path, number: int, chunks: Sequence[pa.Table]) -> None:
    """Write file `number` of a store, one row group for each chunk; whole or not at all."""
    path = _file(folder, number)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        for table in chunks:  # a chunk without rows would have no row group
            writer.write_table(table if table.num_rows else _NO_ROW, row_group_size=max(1, table.num_rows))
    partial.replace(path)


def finish(folder: Path, facts: dict[str, Any]) -> None:
    """Declare a store whole."""
    partial = folder / f"{_COMPLETE}.partial"
    partial.write_text(json.dumps(facts, indent=2) + "\n")
    partial.replace(folder / _COMPLETE)


def read_stored(folder: str, index: int, rows: Sequence[int]) -> list[tuple[Encoding, int | None, float]]:
    """(tokens, counter, side) of rows of the set's chunk `index`.

    Raises:
        RequestError: the store is damaged.
    """
    table = _chunk(folder, index)
    taken = table.take(rows).to_pylist()
    return [
        (
            Encoding(
                row["input_ids"],
                row["labels"],
                row["cut"],
                border=row["border"],
                desirable=None if row["desirable"] < 0 else bool(row["desirable"]),
                answer=row["answer"],
            ),
            None if row["counter"] < 0 else row["counter"],
            row["side"],
        )
        for row in taken
    ]


@lru_cache(maxsize=16)  # the chunks of a few groups that are shuffled together
def _chunk(folder: str, index: int) -> pa.Table:
    number, group = divmod(index, CHUNKS_PER_FILE)
    path = _file(Path(folder), number)
    try:
        with pq.ParquetFile(path) as file:
            return file.read_row_group(group)
    except (OSError, pa.ArrowException) as error:
        raise RequestError(
            f"{path}: prepared data that cannot be read: {error}; delete {folder} and prepare the data again"
        ) from None


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"
