"""Prepared tokens: found only where nothing that changes them has changed, and the same stream as without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayloom.config.job import JobConfig
from rayloom.data.plan import Position
from rayloom.data.segment import EncodeSegment
from rayloom.data.store import find_store, finish, store_folder
from rayloom.data.walk import Walk
from rayloom.errors import RequestError
from rayloom.stages.prepare import prepare_data, segment_options, with_stores
from rayloom.train.preparation import _prepare_file


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> JobConfig:
    rows = [{"instruction": f"question {n}", "output": "word " * (n % 30 + 1)} for n in range(80)]
    rows[7] = {"instruction": "no answer"}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [str(path)], "cutoff": 24, "window": 16, "on_bad_row": "skip", "held_out": 0.1}
    return JobConfig.model_validate(
        {"name": "s", "output_dir": str(tmp_path), "model": {"path": str(tiny_model)}, "data": data}
    )


def prepare_here(job: JobConfig) -> Path:
    """What the tasks of `rayloom data prepare` do, one after the other."""
    plan, encoder = prepare_data(job)
    options = segment_options(job)
    folder = store_folder(Path(job.output_dir) / "prepared", plan.sets[0], encoder.key(), options.cutoff)
    folder.mkdir(parents=True)
    made = _prepare_file((plan.sets[0], encoder, options), 0, 0, str(folder))
    assert isinstance(made, tuple)
    finish(folder, {})
    return folder


def test_the_stream_is_the_same_with_a_store(job: JobConfig) -> None:
    plan, encoder = prepare_data(job)
    plain = segment_options(job)
    folder = prepare_here(job)
    stored = with_stores(job, plan, encoder, plain)
    assert stored.stores == (str(folder),)
    for part in ("train", "held out"):
        tables = [
            [EncodeSegment(encoder, replace(options, part=part))(plan, s) for s in Walk(plan).segments(Position())]
            for options in (plain, stored)
        ]
        assert tables[0] == tables[1]
        assert sum(table.num_rows for table in tables[0]) > 2


@pytest.mark.parametrize(
    "change",
    [
        {"cutoff": 32},
        {"train_on_prompt": True},
        {"mask_history": True},
        {"template": "llama3"},
        {"train": ["HERE/b.jsonl"]},
    ],
)
def test_a_change_finds_no_store(job: JobConfig, change: dict[str, Any], tmp_path: Path) -> None:
    prepare_here(job)
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    document = json.loads(json.dumps(change).replace("HERE", str(tmp_path)))
    other = JobConfig.model_validate({**job.model_dump(), "data": {**job.data.model_dump(), **document}})
    plan, encoder = prepare_data(other)
    assert with_stores(other, plan, encoder, segment_options(other)).stores == (None,)


def test_a_changed_file_finds_no_store(job: JobConfig, tmp_path: Path) -> None:
    prepare_here(job)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "one more", "output": "row"}) + "\n")
    plan, encoder = prepare_data(job)
    assert with_stores(job, plan, encoder, segment_options(job)).stores == (None,)


def test_a_store_that_was_not_finished_is_none(job: JobConfig) -> None:
    folder = prepare_here(job)
    (folder / "complete.json").unlink()
    plan, encoder = prepare_data(job)
    assert find_store(folder.parent, plan.sets[0], encoder.key(), job.data.cutoff) is None


def test_a_damaged_store_is_named(job: JobConfig) -> None:
    folder = prepare_here(job)
    plan, encoder = prepare_data(job)
    options = with_stores(job, plan, encoder, segment_options(job))
    (folder / "00000.parquet").write_bytes(b"no parquet")
    segment, _ = Walk(plan).step(Position())
    with pytest.raises(RequestError, match=r"00000\.parquet: prepared data that cannot be read"):
        EncodeSegment(encoder, options)(plan, segment)
