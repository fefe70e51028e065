"""Stage spin without its engines: what is refused before anything is written, and which pairs are held out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job, validate_job
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


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"rollout": {"share_gpus": True, "gpu_memory": 0.5}},
            "rollout.share_gpus: in stage spin engines and workers take turns",
        ),
        ({"rollout": {"max_staleness": 1}}, "rollout.max_staleness: in stage spin"),
        ({"method": {"extra_modules": ["lm_head"]}}, "method.extra_modules: the engines serve adapters only"),
        ({"method": {"rank": 1024}}, "method.rank: 1024: the engines serve adapters up to rank 512"),
        ({"model": {"train_from_scratch": True}}, "model.train_from_scratch: the engines load the model as it is"),
        (
            {"data": {"train": [{"path": "a.jsonl", "prompts_only": True}], "mix": "concat"}},
            r"data.train\[0\].prompts_only: stage spin learns from the answers",
        ),
        ({"data": {"train": ["nowhere.jsonl"], "mix": "concat"}}, "nowhere.jsonl"),
    ],
)
def test_what_is_refused_before_the_old_run_is_deleted(tmp_path, parts, message):
    config = job(tmp_path, overwrite=True, **parts)
    (config.run_dir / "model").mkdir(parents=True)
    (config.run_dir / "job.yaml").write_text(dump_job(config))
    with pytest.raises(RequestError, match=message):
        run_self_play(config, started=time.time())
    assert sorted(one.name for one in config.run_dir.iterdir()) == ["job.yaml", "model"]


def test_it_goes_on_as_the_job_that_it_was(tmp_path):
    began = job(tmp_path)
    began.run_dir.mkdir(parents=True)
    (began.run_dir / "job.yaml").write_text(dump_job(began))
    for parts, fault in (
        ({"stage": {"beta": 0.5}}, "stage.beta differs"),
        ({"rollout": {"temperature": 0.5}}, "rollout.temperature differs"),
        ({"data": {"cutoff": 32}}, "data.cutoff differs"),
    ):
        with pytest.raises(RequestError, match=f"resume: {fault} from the run's own"):
            run_self_play(job(tmp_path, resume=True, **parts), started=time.time())
    with pytest.raises(RequestError, match=r"a.jsonl"):  # which is not there; more rounds are no fault
        run_self_play(job(tmp_path, resume=True, stage={"rounds": 7}), started=time.time())


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
