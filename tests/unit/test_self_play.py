"""Stage spin without its engines: what is refused before anything is written, and which pairs are held out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.config.read import validate_job
from rayloom.data.example import Example, Message
from rayloom.data.index import make_plan
from rayloom.data.plan import Position
from rayloom.data.segment import SegmentOptions, read_segment, side_of
from rayloom.data.walk import Walk
from rayloom.errors import RequestError
from rayloom.train.self_play import _pair, _round_job, check_self_play, run_self_play


def job(folder: Path, **parts: Any) -> JobConfig:
    document: dict[str, Any] = {
        "name": "self-play",
        "output_dir": str(folder),
        "model": {"path": "somewhere"},
        "data": {"train": ["a.jsonl", "b.jsonl"], "cutoff": 64, "held_out": 0.3},
        "stage": {"type": "spin"},
        "train": {"device": "cpu"},
    }
    for key, value in parts.items():
        document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    return validate_job(Document("test", document))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"data": {"train_on_prompt": True}}, "data.train_on_prompt: .* learns from the last answer"),
        ({"data": {"mask_history": True}}, "data.mask_history: .* learns from the last answer"),
        ({"model": {"moe_aux_loss": 0.1}}, "model.moe_aux_loss: .* adds no router's loss"),
        ({"train": {"best_metric": "eval_loss/a", "eval_steps": 5}}, "train.best_metric: eval_loss/a is not told"),
        ({"model": {"add_tokens": ["<new>"]}}, "model.add_tokens: the engines load the model as it is"),
        ({"model": {"quantization": "nf4"}}, "model.quantization: the engines load the model as it is"),
    ],
)
def test_what_a_round_would_refuse_is_refused_before_the_old_run_is_deleted(tmp_path, parts, message):
    config = job(tmp_path, overwrite=True, **parts)
    (config.run_dir / "model").mkdir(parents=True)
    with pytest.raises(RequestError, match=message):
        run_self_play(config, started=time.time())
    assert [one.name for one in config.run_dir.iterdir()] == ["model"]


def test_a_job_that_can_be(tmp_path):
    check_self_play(job(tmp_path))
    check_self_play(job(tmp_path, stage={"rounds": 1}, train={"best_metric": "eval_loss", "eval_steps": 5}))
    check_self_play(job(tmp_path, rollout={"max_tokens": 8}))


def test_the_same_rows_are_held_out_in_every_round(tmp_path):
    """Whatever the model has answered; a row that another stage reads is on the side that all it says tells."""
    config, held_out = job(tmp_path), []
    for number in (1, 2):
        file = tmp_path / f"answers-{number}.jsonl"
        pairs = [
            _pair(Example((Message("user", f"Q{i}"),)), f"A{i}", f"round {number} says {i * number}")
            for i in range(200)
        ]
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        data = _round_job(config, tmp_path, number, file, None).data
        options = SegmentOptions(cutoff=64, packing=False, held_out=data.held_out, part="held out")
        plan = make_plan(data, seed=number, epochs=1)
        items = [item for one in Walk(plan).segments(Position()) for item in read_segment(plan, one, options)]
        held_out.append(sorted(item.example.messages[0].content for item in items if item.example))
    assert held_out[0] == held_out[1]
    assert 30 < len(held_out[0]) < 90  # 60 +- 6 by chance
    assert side_of({"instruction": "Q", "output": ["A", "B"]}) == 0.042687147192370385
