"""Data sets on a server that speaks the S3 protocol: found, read by range, and the same as on a disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from tests.object_storage import BUCKET, storage_server

from rayloom.data.config import DataConfig
from rayloom.data.files import count_rows, locate, read_rows
from rayloom.data.index import make_plan
from rayloom.errors import RequestError

ROWS = [{"instruction": f"Question {number}?", "output": "word " * (number % 50 + 1)} for number in range(30_000)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder whose files are in the bucket too, below `data`."""
    folder = tmp_path_factory.mktemp("files")
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "a.jsonl").write_text("".join(lines[:20_000]))
    (folder / "b.jsonl").write_text("".join(lines[20_000:]))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=5_000)
    with storage_server(folder / "log"):
        system = s3fs.S3FileSystem()
        for file in folder.glob("*.*"):
            system.put_file(str(file), f"{BUCKET}/data/{file.name}")
        yield folder


def test_a_file_a_glob_and_a_parquet_file_are_read_as_from_a_disk(files: Path) -> None:
    for pattern in ("a.jsonl", "*.jsonl", "rows.parquet"):
        there, here = locate(f"s3://{BUCKET}/data/{pattern}"), locate(str(files / pattern))
        assert [(file.size, file.chunks) for file in there] == [(file.size, file.chunks) for file in here]
        for one, other in zip(there, here, strict=True):
            chunk = one.chunks - 1
            number = count_rows(one, chunk)
            assert number == count_rows(other, chunk)
            wanted = [0, number // 2, number - 1]
            rows = [[raw.columns for raw in read_rows(file, chunk, wanted)] for file in (one, other)]
            assert rows[0] == rows[1]
            assert all(row in ROWS for row in rows[0] if row is not None)


def test_a_plan_of_them(files: Path) -> None:
    plans = [
        make_plan(DataConfig.model_validate({"train": [f"{place}/*.jsonl"]}), seed=0, epochs=1)
        for place in (f"s3://{BUCKET}/data", str(files))
    ]
    assert plans[0].sets[0].estimated_rows == plans[1].sets[0].estimated_rows


def test_what_is_not_there_is_named(files: Path) -> None:
    with pytest.raises(RequestError, match=rf"s3://{BUCKET}/data/none\.jsonl"):
        locate(f"s3://{BUCKET}/data/none.jsonl")
