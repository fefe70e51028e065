"""From the `data` part of a job to a plan: formats are told, faults are named with file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rayloom.data.index
from rayloom.data.config import DataConfig
from rayloom.data.index import check_rows, make_plan
from rayloom.data.plan import Plan
from rayloom.errors import RequestError

GOOD = {"instruction": "Q", "output": "A"}


def plan_for(*sets: Any, epochs: int | None = 1, **data: Any) -> Plan:
    return make_plan(DataConfig.model_validate({"train": list(sets), **data}), seed=1, epochs=epochs)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_plan_says_what_the_job_says(tmp_path):
    a = write(tmp_path / "a.jsonl", *[GOOD] * 3)
    b = write(tmp_path / "b.jsonl", *[{"messages": []}] * 2)
    plan = plan_for({"path": a, "weight": 2}, {"path": b, "name": "chats"}, mix="interleave_over", window=7, epochs=4)
    assert [(s.name, s.format, s.length) for s in plan.sets] == [("a", "alpaca", 3), ("chats", "openai", 2)]
    assert (plan.mixture.lengths, plan.mixture.weights, plan.mixture.strategy) == (
        (3, 2),
        (2.0, 1.0),
        "interleave_over",
    )
    assert (plan.seed, plan.window, plan.epochs) == (1, 7, 4)


def test_a_named_format_is_not_questioned(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "Q", "messages": []})
    assert plan_for({"path": path, "format": "openai"}).sets[0].format == "openai"
    assert plan_for({"path": path}).sets[0].format == "alpaca"


def test_a_format_that_cannot_be_told(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "chosen": "A"})
    with pytest.raises(RequestError) as refused:
        plan_for(path)
    assert refused.value.messages == (
        f"{path}:1: row 1: cannot tell the format of {path} from the columns 'prompt', 'chosen'; known are "
        "'instruction' (alpaca), 'conversations' (sharegpt), 'messages' (openai), or name a `format`",
    )


def test_the_first_bad_row_of_every_set_has_a_message(tmp_path):
    a = write(tmp_path / "a.jsonl", GOOD, {"instruction": "Q"}, {})
    b = write(tmp_path / "b.jsonl", GOOD)
    c = write(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "Q"}]})
    plan = plan_for(a, b, c)
    with pytest.raises(RequestError) as refused:
        check_rows(plan)
    assert refused.value.messages == (
        f"{a}:2: row 2: has no column 'output'; its columns are 'instruction' (read as alpaca)",
        f"{c}:1: row 1: ends without an assistant's answer, so there is nothing to learn (read as openai)",
    )


def test_the_check_reads_the_first_megabytes_only(tmp_path, monkeypatch):
    rows = [{"instruction": "Q" * 1000, "output": "A"}] * 5000
    path = write(tmp_path / "a.jsonl", *rows, {"instruction": "Q"})
    plan = plan_for(path)
    assert len(plan.sets[0].chunks) > 4
    check_rows(plan)  # the bad row stands behind what is checked
    monkeypatch.setattr(rayloom.data.index, "CHECKED_BYTES", 1 << 30)
    with pytest.raises(RequestError, match=r"a\.jsonl:5001: row 5001: has no column 'output'"):
        check_rows(plan)
