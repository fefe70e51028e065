"""Jobs with optimizers of other kinds, from the job file to the model, on two workers where these may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.ray.small_jobs import job, run, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected")]

FULL = {"type": "full"}
JOBS: dict[str, dict[str, Any]] = {
    "badam": {"method": FULL, "optimizer": {"type": "badam", "switch_interval": 2}, "train": {"workers": 2}},
    "apollo": {"method": FULL, "optimizer": {"type": "apollo_adamw", "rank": 8}, "train": {"workers": 2}},
    "galore-layerwise": {
        "method": FULL,
        "optimizer": {"type": "galore_adamw_layerwise", "rank": 8},
        "train": {"max_grad_norm": None},
    },
    "loraplus-neftune": {
        "optimizer": {"lora_plus_ratio": 8.0},
        "stage": {"neftune": 5.0},
        "data": {"held_out": 0.1},
        "train": {"workers": 2, "deepspeed": "zero2", "eval_steps": 2},
    },
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_trains(name: str, tiny_model: Path, tmp_path: Path) -> None:
    parts = JOBS[name]
    sets = [{"path": str(write_rows(tmp_path / "rows.jsonl", 60))}]
    config = job(tiny_model, tmp_path, sets, name, **{**parts, "train": {**parts["train"], "max_steps": 5}})
    result, rows = run(config)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert (result["status"], len(losses)) == ("finished", 5)
    assert losses[-1] < losses[0]
    if "data" in parts:
        evaluations = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
        assert set(evaluations) == {2, 4, 5}
        assert evaluations[5] < evaluations[2]
        return
    start, trained = load_file(tiny_model / "model.safetensors"), load_file(config.run_dir / "model/model.safetensors")
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    if name == "badam":
        assert moved == {name for name in start if ".layers." in name}  # two layers took turns
        assert result["parameters"]["trained"] < result["parameters"]["all"]
    else:
        assert moved == set(start)


def test_a_stopped_job_goes_on_with_its_block(tiny_model: Path, tmp_path: Path) -> None:
    sets = [{"path": str(write_rows(tmp_path / "rows.jsonl", 60))}]
    optimizer = {"type": "badam", "switch_interval": 2, "switch_mode": "random"}

    def part(name: str, steps: int, **more: Any) -> Any:
        train = {"max_steps": steps, "scheduler": "constant", "warmup": 0.0}
        return job(tiny_model, tmp_path, sets, name, method=FULL, optimizer=optimizer, train=train, **more)

    run(part("whole", 6))
    run(part("parts", 3))
    run(part("parts", 6, resume=True))
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
