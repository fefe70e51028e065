"""Stage spin: each round's model answers, the next learns from that; what is whole is not made again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.ray.small_jobs import job, write_rows
from transformers import AutoModelForCausalLM

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.train.self_play import run_self_play


def self_play(model: Path, folder: Path, data: Path, **parts: object) -> JobConfig:
    return job(
        model,
        folder,
        [{"path": str(data)}],
        "self-play",
        stage={"type": "spin", "rounds": 2},
        rollout={"max_tokens": 8, "kv_cache_gib": 0.25},
        train={"max_steps": 6, "learning_rate": 5e-3},
        **parts,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("connected")
def test_two_rounds(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 24)
    config = self_play(tiny_model, tmp_path, data)
    result = run_self_play(config, started=time.time())
    assert result["status"] == "finished"
    assert len(result["rounds"]) == 2
    given = [json.loads(line) for line in data.read_text().splitlines()]
    texts = []
    for number in (1, 2):
        rows = [json.loads(line) for line in (config.run_dir / "rounds" / f"answers-{number}.jsonl").open()]
        assert [row["chosen"]["content"] for row in rows] == [row["output"] for row in given]
        assert [row["messages"][-1]["content"] for row in rows] == [row["instruction"] for row in given]
        texts.append([row["rejected"]["content"] for row in rows])
    assert texts[0] != texts[1]  # another model, and other seeds
    # The second round begins at the first one's adapter and has it as its reference.
    second = [json.loads(line) for line in (config.run_dir / "rounds" / "round-2" / "metrics.jsonl").open()]
    assert second[0]["loss"] == pytest.approx(0.6931, abs=2e-3)
    assert second[-1]["rewards/margin"] > 0
    final = load_file(config.run_dir / "model" / "adapter_model.safetensors")
    first = load_file(config.run_dir / "rounds" / "round-1" / "model" / "adapter_model.safetensors")
    assert any(not torch.equal(final[name], first[name]) for name in final)
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), config.run_dir / "model")
    # Going on with a finished job makes nothing again.
    written = (config.run_dir / "rounds" / "answers-2.jsonl").stat().st_mtime_ns
    again = run_self_play(config.model_copy(update={"resume": True}), started=time.time())
    assert again["steps"] == result["steps"]
    assert (config.run_dir / "rounds" / "answers-2.jsonl").stat().st_mtime_ns == written
    with pytest.raises(RequestError, match="holds a finished run"):
        run_self_play(config, started=time.time())


def test_what_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 4)
    with pytest.raises(RequestError, match=r"method.type: stage spin trains one new adapter"):
        run_self_play(self_play(tiny_model, tmp_path, data, method={"type": "full"}), started=time.time())
    with pytest.raises(RequestError, match="resume: there is no run in"):
        run_self_play(self_play(tiny_model, tmp_path, data, resume=True), started=time.time())
    assert not (tmp_path / "self-play").exists()
