"""From the `data` part of a job to a plan: formats are told, faults are named with file and row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rayloom.data.index
from rayloom.data.config import DataConfig
from rayloom.data.index import check_rows, make_plan
from rayloom.data.plan import Plan
from rayloom.data.segment import SegmentOptions
from rayloom.errors import RequestError

GOOD = {"instruction": "Q", "output": "A"}
OPTIONS = SegmentOptions(cutoff=64, packing=True)


def plan_for(*sets: Any, epochs: int | None = 1, **data: Any) -> Plan:
    return make_plan(DataConfig.model_validate({"train": list(sets), **data}), seed=1, epochs=epochs)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_plan_says_what_the_job_says(tmp_path):
    a = write(tmp_path / "a.jsonl", *[GOOD] * 3)
    b = write(tmp_path / "b.jsonl", *[{"messages": []}] * 2)
    plan = plan_for({"path": a, "weight": 2}, {"path": b, "name": "chats"}, mix="interleave_over", window=7, epochs=4)
    assert [(s.name, s.description.format, s.estimated_rows) for s in plan.sets] == [
        ("a", "alpaca", 3),
        ("chats", "openai", 2),
    ]
    assert (plan.lengths, plan.weights, plan.strategy) == ((3, 2), (2.0, 1.0), "interleave_over")
    assert (plan.seed, plan.window, plan.epochs) == (1, 7, 4)


def test_a_named_format_is_not_questioned(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "Q", "messages": []})
    assert plan_for({"path": path, "format": "openai"}).sets[0].description.format == "openai"
    assert plan_for({"path": path}).sets[0].description.format == "alpaca"


def test_a_format_that_cannot_be_told(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "chosen": "A"})
    with pytest.raises(RequestError) as refused:
        plan_for(path)
    assert refused.value.messages == (
        f"{path}:1: row 1: cannot tell the format of {path} from the columns 'prompt', 'chosen'; known are "
        "'instruction' (alpaca), 'conversations' (sharegpt), 'messages' (openai), 'text' (text), or name a "
        "`format`",
    )


def test_the_first_bad_row_of_every_set_has_a_message(tmp_path):
    a = write(tmp_path / "a.jsonl", GOOD, {"instruction": "Q"}, {})
    b = write(tmp_path / "b.jsonl", GOOD)
    c = write(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "Q"}]})
    plan = plan_for(a, b, c)
    with pytest.raises(RequestError) as refused:
        check_rows(plan, OPTIONS)
    assert refused.value.messages == (
        f"{a}:2: row 2: has no column 'output'; its columns are 'instruction' (read as alpaca)",
        f"{c}:1: row 1: ends without an assistant's answer, so there is nothing to learn (read as openai)",
    )


def test_the_check_reads_the_first_megabytes_only(tmp_path, monkeypatch):
    rows = [{"instruction": "Q" * 1000, "output": "A"}] * 6000
    path = write(tmp_path / "a.jsonl", *rows, {"instruction": "Q"})
    plan = plan_for(path)
    assert plan.sets[0].chunks > 4
    check_rows(plan, OPTIONS)  # the bad row stands behind what is checked
    monkeypatch.setattr(rayloom.data.index, "CHECKED_BYTES", 1 << 30)
    with pytest.raises(RequestError, match=r"a\.jsonl:6001: row 6001: has no column 'output'"):
        check_rows(plan, OPTIONS)


# --- descriptions, samples, converters ------------------------------------------------------------------------------


def test_a_name_of_the_description_file_is_a_path(tmp_path):
    write(tmp_path / "rows.jsonl", *[{"q": "Q", "a": "A"}] * 6)
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"quiz": {"file_name": "rows.jsonl", "num_samples": 4, "columns": {"prompt": "q", "response": "a"}}})
    )
    plan = plan_for("quiz", {"path": "quiz", "name": "less", "max_samples": 2}, description=str(tmp_path))
    assert [(s.name, s.length, s.description.columns.prompt) for s in plan.sets] == [("quiz", 4, "q"), ("less", 2, "q")]
    check_rows(plan, OPTIONS)


def test_a_set_that_only_another_hub_has(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"far": {"ms_hub_url": "some/set"}}))
    with pytest.raises(RequestError, match="'far' is to be had only on ModelScope"):
        plan_for("far", description=str(tmp_path))


def test_a_sample_counts_no_more_chunks_than_it_needs(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", *[{"instruction": "Q" * 1000, "output": "A"}] * 20000)
    counted = []
    count = rayloom.data.index.count_chunk
    monkeypatch.setattr(rayloom.data.index, "count_chunk", lambda *args: counted.append(args) or count(*args))
    (data_set,) = plan_for({"path": path, "max_samples": 1500}).sets
    assert data_set.length == 1500
    assert len(counted) == data_set.chunks == 2
    (whole,) = plan_for({"path": path, "max_samples": 10**6}).sets
    assert whole.length is None  # there are fewer rows: nothing is left out


def test_a_format_of_the_users_own(tmp_path):
    converters = tmp_path / "mine.py"
    converters.write_text(
        "from rayloom.data.example import Example, Message\n"
        "def quiz(row, description):\n"
        "    return Example((Message('user', row['q']), Message('assistant', row['a'])))\n"
        "CONVERTERS = {'quiz': quiz}\n"
    )
    path = write(tmp_path / "a.jsonl", {"q": "Q", "a": "A"}, {"q": "Q"})
    plan = plan_for({"path": path, "format": "quiz"}, converters=str(converters))
    with pytest.raises(RequestError, match=r"a\.jsonl:2: row 2: .*KeyError.*'a'.*\(read as quiz\)"):
        check_rows(plan, replace(OPTIONS, converters=str(converters)))


def test_held_out_and_eval_exclude_each_other(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ValueError, match="two ways to say what to evaluate on"):
        plan_for(path, eval=[path], held_out=0.1)


def test_a_format_is_told_from_the_first_row_that_can_be_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("no json\n" + json.dumps(GOOD) + "\n")
    plan = plan_for(str(path))
    assert plan.sets[0].description.format == "alpaca"
    check_rows(plan, replace(OPTIONS, on_bad_row="skip"))
    with pytest.raises(RequestError, match=r"a\.jsonl:1: row 1: not JSON"):
        check_rows(plan, OPTIONS)
