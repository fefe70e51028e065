"""From what the user names to files: files, folders, globs, saved data sets, names on the hub."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from tests.unit.test_files_lines import read_all

from rayloom.data.files import DataFile, locate
from rayloom.errors import RequestError

KNOWN = "known are .jsonl, .ndjson, .json, .csv, .tsv, .txt (each also with .gz or .zst), .parquet and .arrow"


def refusal(path: object, **options: str) -> str:
    with pytest.raises(RequestError) as refused:
        locate(str(path), **options)
    (message,) = refused.value.messages
    return message


def columns(files: tuple[DataFile, ...]) -> list[object]:
    return [row.columns for file in files for _, row in read_all(file)]


def write(folder: Path, name: str, *rows: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_is_all_its_data_files(tmp_path):
    write(tmp_path, "b.jsonl", {"b": 1})
    write(tmp_path, "sub/a.jsonl", {"other": 2})
    write(tmp_path, "a.txt", 5)
    write(tmp_path, "empty.jsonl")
    for name in (".hidden.jsonl", ".cache/c.jsonl", "README.md", "dataset_info.json", "state.json"):
        write(tmp_path, name, {"no": 1})
    files = locate(str(tmp_path))
    assert [file.address for file in files] == [f"{tmp_path}/{name}" for name in ("a.txt", "b.jsonl", "sub/a.jsonl")]
    assert columns(files) == [{"text": "5"}, {"b": 1}, {"other": 2}]
    assert columns(locate(str(tmp_path), folder="sub")) == [{"other": 2}]


def test_a_glob(tmp_path):
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl", "deep/er/a3.jsonl", "a4.md"):
        write(tmp_path, name, {"name": name})
    assert columns(locate(f"{tmp_path}/a*")) == [{"name": "a1.jsonl"}, {"name": "a2.jsonl"}]
    assert len(locate(f"{tmp_path}/**/*.jsonl")) == 4
    assert refusal(f"{tmp_path}/c*") == f"{tmp_path}/c*: no data file matches it; {KNOWN}"
    strange = write(tmp_path, "a[1].jsonl", {"a": 1})
    assert columns(locate(str(strange))) == [{"a": 1}]


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "x.jsonl", {"a": 1})
    ((place, row),) = read_all(locate("~/x.jsonl")[0])
    assert (place, row.columns) == (f"{tmp_path}/x.jsonl:1: row 1", {"a": 1})
    assert columns(locate(f"file://{tmp_path}/x.jsonl")) == [{"a": 1}]


def test_what_is_no_data_file(tmp_path):
    assert refusal(tmp_path / "nope.jsonl") == f"{tmp_path}/nope.jsonl: no such data file"
    assert refusal("nope/a.jsonl") == "nope/a.jsonl: no such data file"
    assert refusal(write(tmp_path, "a.xls", 1)) == f"{tmp_path}/a.xls: cannot read .xls; {KNOWN}"
    assert refusal(write(tmp_path, "jsonl", 1)) == f"{tmp_path}/jsonl: cannot read a file without an ending; {KNOWN}"
    assert refusal(write(tmp_path, "a.tar.gz", 1)) == f"{tmp_path}/a.tar.gz: cannot read .gz; {KNOWN}"
    (tmp_path / "folder.jsonl").mkdir()
    assert refusal(tmp_path / "folder.jsonl") == f"{tmp_path}/folder.jsonl: no data file in it; {KNOWN}"


@pytest.mark.parametrize("content", ["", "\n \r\n\t\n", "\ufeff\n"])
def test_sets_without_a_row(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    for path in (tmp_path, tmp_path / "a.jsonl"):
        assert refusal(path) == f"{path}: is empty; a data set needs at least one row"


def test_saved_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": str(number)} for number in range(2500)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    files = locate(str(tmp_path / "one"))
    assert [file.chunk_rows for file in files] == [(1000, 250), (1000, 250)]
    assert columns(files) == rows
    datasets.DatasetDict(train=data, test=data.select(range(5))).save_to_disk(tmp_path / "both")
    assert columns(locate(str(tmp_path / "both"))) == rows
    assert columns(locate(str(tmp_path / "both"), split="test")) == rows[:5]
    assert refusal(tmp_path / "both", split="dev") == f"{tmp_path}/both: has no split 'dev'; its splits are train, test"


# --- the hub ----------------------------------------------------------------------------------------------------------

README = """\
---
license: mit
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*.jsonl}
  - {split: test, path: small/test.jsonl}
- config_name: large
  default: true
  data_files: large/*.jsonl
---
# A data set
"""


@pytest.fixture
def repository(tmp_path):
    """A folder as a data set lies on the hub."""
    pytest.importorskip("datasets")
    (tmp_path / "README.md").write_text(README)
    for name in ("small/train-1.jsonl", "small/train-2.jsonl", "small/test.jsonl", "large/a.jsonl"):
        write(tmp_path, name, {"name": name})
    return tmp_path


def test_subsets_and_splits(repository):
    assert columns(locate(str(repository))) == [{"name": "large/a.jsonl"}]
    small = locate(str(repository), subset="small")
    assert columns(small) == [{"name": "small/train-1.jsonl"}, {"name": "small/train-2.jsonl"}]
    assert small[0].address == f"{repository}/small/train-1.jsonl"
    assert columns(locate(str(repository), subset="small", split="test")) == [{"name": "small/test.jsonl"}]


def test_subsets_and_splits_that_are_not_there(repository):
    assert refusal(repository, subset="small", split="dev") == (
        f"{repository}: has no split 'dev'; its splits are train, test"
    )
    assert "'none' not found. Available: ['small', 'large']" in refusal(repository, subset="none")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    """Port 9 of this machine answers nobody."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    message = refusal("nobody/nothing")
    assert message.startswith("nobody/nothing: no such data file here, and the Hugging Face hub cannot be reached: ")
    assert "refused" in message
    assert time.perf_counter() - started < 15


def test_a_copy_is_the_same_file(tmp_path):
    """Its time is another one, as on a node to which the job's folder was copied."""
    path = write(tmp_path, "a.jsonl", {"a": 1})
    (file,) = locate(str(path))
    copy = tmp_path / "copy.jsonl"
    shutil.copyfile(path, copy)
    (copied,) = locate(str(copy))
    assert copied.fingerprint == file.fingerprint
    assert copied.source.stamp != file.source.stamp
