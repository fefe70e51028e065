"""Remote files: by range only, tried again when a read fails, refused when they changed."""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from tests.unit.test_files_lines import read_all

from rayloom.data.files import access, count_rows, estimate_rows, lines, locate, place, read_rows
from rayloom.data.files.cache import RecentlyRead
from rayloom.errors import RequestError


class Bucket(AbstractFileSystem):
    """An object store in memory that counts what it gives, and fails when it is told to."""

    protocol = "bucket"
    objects: dict[str, bytes] = {}  # noqa: RUF012 - of all instances, as a store is
    given: list[int] = []  # noqa: RUF012
    failures: list[Exception] = []  # noqa: RUF012

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.objects:
            data = self.objects[path]
            return {"name": path, "size": len(data), "type": "file", "ETag": f"{len(data)}-{hash(data)}"}
        if any(name.startswith(path.rstrip("/") + "/") for name in self.objects):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path).rstrip("/") + "/"
        inside = {path + name.removeprefix(path).split("/")[0] for name in self.objects if name.startswith(path)}
        return [self.info(name) if detail else name for name in sorted(inside)]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> BucketFile:
        return BucketFile(self, path, mode, **options)


class BucketFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        if Bucket.failures:
            raise Bucket.failures.pop(0)
        Bucket.given.append(end - start)
        return Bucket.objects[self.path][start:end]


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    for name in ("objects", "given", "failures"):
        monkeypatch.setattr(Bucket, name, type(getattr(Bucket, name))())
    access._check_remote.cache_clear()
    return Bucket


def rows_of(number: int, size: int = 500) -> bytes:
    return b"".join(json.dumps({"n": row, "x": "x" * size}).encode() + b"\n" for row in range(number))


def test_only_the_chunk_that_is_wanted_is_read(bucket):
    bucket.objects["b/a.jsonl"] = rows_of(110_000)
    size = len(bucket.objects["b/a.jsonl"])
    assert size > 50 << 20
    (file,) = locate("bucket://b/a.jsonl")
    assert sum(bucket.given) == 0
    assert (file.address, file.size) == ("bucket://b/a.jsonl", size)
    number = count_rows(file, 25)
    first, last = read_rows(file, 25, [0, number - 1])
    assert last.columns["n"] - first.columns["n"] == number - 1
    assert sum(bucket.given) < 1.1 * (1 << 20)
    assert len(bucket.given) == 1
    assert estimate_rows([file]) == pytest.approx(110_000, rel=0.02)
    assert sum(bucket.given) < 2.2 * (1 << 20)


def test_only_the_row_group_that_is_wanted_is_read(bucket):
    generator = random.Random(0)
    table = pa.table({"n": range(100_000), "x": [generator.randbytes(270).hex() for _ in range(100_000)]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=2000, use_dictionary=False, compression="none")
    bucket.objects["b/a.parquet"] = sink.getvalue().to_pybytes()
    assert len(bucket.objects["b/a.parquet"]) > 50 << 20
    (file,) = locate("bucket://b/a.parquet")
    assert sum(bucket.given) < 1 << 20
    before = sum(bucket.given)
    (row,) = read_rows(file, 25, [7])
    assert row.columns == {"n": 50_007, "x": table["x"][50_007].as_py()}
    assert sum(bucket.given) - before < 1.2 * (1 << 20)


def test_batches_of_an_arrow_file(bucket):
    table = pa.table({"n": range(100_000), "x": ["x" * 100] * 100_000})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    bucket.objects["b/a.arrow"] = sink.getvalue().to_pybytes()
    (file,) = locate("bucket://b/a.arrow")
    assert sum(bucket.given) < 1 << 20
    before = sum(bucket.given)
    assert read_rows(file, 50, [3])[0].columns["n"] == 50_003
    assert sum(bucket.given) - before < 150_000


def test_folders_globs_and_saved_sets(bucket):
    for name in ("b/d/a.jsonl", "b/d/sub/c.jsonl", "b/d/README.md", "b/d/.git/x.jsonl", "b/other.jsonl"):
        bucket.objects[name] = json.dumps({"name": name}).encode()
    found = ["bucket://b/d/a.jsonl", "bucket://b/d/sub/c.jsonl"]
    assert [file.address for file in locate("bucket://b/d")] == found
    assert [file.address for file in locate("bucket://b/d/")] == found
    assert [file.address for file in locate("bucket://b/d", folder="sub")] == found[1:]
    assert [file.address for file in locate("bucket://b/*.jsonl")] == ["bucket://b/other.jsonl"]
    assert [file.address for file in locate("bucket://b/d/**/*.jsonl")] == found
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema({"n": pa.int64()})) as writer:
        writer.write_table(pa.table({"n": [1, 2]}))
    bucket.objects["s/dataset_dict.json"] = b'{"splits": ["train", "test"]}'
    bucket.objects["s/test/state.json"] = b'{"_data_files": [{"filename": "data.arrow"}]}'
    bucket.objects["s/test/data.arrow"] = sink.getvalue().to_pybytes()
    (file,) = locate("bucket://s", split="test")
    assert [row.columns for _, row in read_all(file)] == [{"n": 1}, {"n": 2}]


def test_the_memory_file_system_and_what_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with fsspec.open("memory://set/a.csv", "wb") as handle:
        handle.write(b"a\n1\n2\n")
    (file,) = locate("memory://set/a.csv")
    assert read_rows(file, 0, [1])[0].columns == {"a": "2"}
    assert place(file, 0, 1) == "memory://set/a.csv: row 2"
    assert [file.address for file in locate("memory://set")] == ["memory:///set/a.csv"]


def test_json_of_others_may_hold_an_object_a_line(tmp_path, monkeypatch, bucket):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bucket.objects["b/a.json"] = b'{"a": 1}\n{"a": 2}\n'
    (file,) = locate("bucket://b/a.json")
    assert [row.columns for _, row in read_all(file)] == [{"a": 1}, {"a": 2}]


def test_a_read_that_fails_is_tried_again(bucket, monkeypatch):
    bucket.objects["b/a.jsonl"] = b'{"a": 1}\n'
    (file,) = locate("bucket://b/a.jsonl", retries=(0, 0))
    bucket.failures += [OSError("slow down"), TimeoutError()]
    assert read_rows(file, 0, [0])[0].columns == {"a": 1}
    monkeypatch.setattr(lines, "RECENTLY_READ", RecentlyRead())
    bucket.failures += [OSError("slow down"), TimeoutError(), OSError("try later\nhost 7")]
    with pytest.raises(RequestError, match=r"bucket://b/a\.jsonl: cannot be read any more: try later$"):
        read_rows(file, 0, [0])


def test_a_failing_read_inside_a_library_says_the_same(bucket):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": [1]}), sink)
    bucket.objects["b/a.parquet"] = sink.getvalue().to_pybytes()
    (file,) = locate("bucket://b/a.parquet", retries=(0,))
    bucket.failures += [OSError("slow down"), OSError("gone")]
    with pytest.raises(RequestError, match=r"bucket://b/a\.parquet: cannot be read any more: gone$"):
        read_rows(file, 0, [0])


def test_a_remote_file_that_changes_or_vanishes(bucket):
    for name in ("b/a.jsonl", "b/b.jsonl"):
        bucket.objects[name] = b'{"a": 1}\n' * 1_000_000
    changed, gone = locate("bucket://b", retries=(0, 0))
    bucket.objects["b/a.jsonl"] = b'{"a": 2}\n' * 1_000_000
    with pytest.raises(RequestError, match=r"a\.jsonl: changed while the job was reading it; start the job again"):
        read_rows(changed, 1, [0])
    del bucket.objects["b/b.jsonl"]
    with pytest.raises(RequestError, match=r"bucket://b/b\.jsonl: cannot be read any more: b/b\.jsonl"):
        read_rows(gone, 1, [0])


def test_addresses_that_cannot_be_read(bucket):
    def refusal(path: str) -> str:
        with pytest.raises(RequestError) as refused:
            locate(path)
        return refused.value.messages[0]

    assert refusal("bucket://b/none.jsonl") == "bucket://b/none.jsonl: no such data file"
    assert refusal("http://127.0.0.1:9/a.jsonl").startswith(
        "http://127.0.0.1:9/a.jsonl: no such data file (Connect call failed"
    )
    assert refusal("nope://b/a.jsonl") == "nope://b/a.jsonl: cannot be read here: Protocol not known: nope"
    bucket.objects["b/a.md"] = b"x"
    assert refusal("bucket://b").startswith("bucket://b: no data file in it; known are .jsonl, ")
    assert refusal("bucket://b/a.md").startswith("bucket://b/a.md: cannot read .md; known are .jsonl, ")


# --- local files that do not stay as they were ------------------------------------------------------------------------


@pytest.mark.parametrize("after", ['{"a": 1, "b": 2}\n', "", '{"a": 3}\n{"b": 2}\n'])
def test_a_local_file_that_changes_meanwhile(tmp_path, after):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n')
    (file,) = locate(str(path))
    path.write_text(after)
    os.utime(path, ns=(1, 1))
    with pytest.raises(RequestError, match=r"a\.jsonl: changed while the job was reading it; start the job again"):
        read_rows(file, 0, [0])


def test_a_local_file_that_was_copied_meanwhile(tmp_path):
    """The same content at another time, as on another node."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    (file,) = locate(str(path))
    os.utime(path, ns=(1, 1))
    assert read_rows(file, 0, [0])[0].columns == {"a": 1}


def test_a_local_file_that_vanishes_meanwhile(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    (file,) = locate(str(path), retries=(0.01, 0.02))
    path.unlink()
    started = time.perf_counter()
    with pytest.raises(RequestError, match=r"a\.jsonl: cannot be read any more: No such file or directory"):
        read_rows(file, 0, [0])
    assert time.perf_counter() - started >= 0.03


# --- what was read last -----------------------------------------------------------------------------------------------


def test_the_cache_keeps_what_was_used_last():
    cache, read = RecentlyRead(10), []

    def get(key: str, size: int) -> str:
        return cache.get(key, lambda: (read.append(key) or key.upper(), size))

    assert [get(key, 4) for key in "abacab"] == list("ABACAB")
    assert "".join(read) == "abcb"
    assert get("z", 99) == get("z", 99) == "Z"  # the newest stays whatever its size
    get("y", 1)
    get("z", 1)
    assert "".join(read) == "abcbzyz"
