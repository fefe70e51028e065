"""Stage ppo under DeepSpeed with all weights: the engines get whole weights, put together from what the ranks hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.ray import test_ppo
from tests.ray.small_jobs import run
from tests.ray.test_ppo import STEPS_A_ROUND, ppo_job

pytestmark = [pytest.mark.usefixtures("connected"), pytest.mark.slow, pytest.mark.timeout(600)]

model, folder = test_ppo.model, test_ppo.folder


def test_zero3_learns_what_ddp_learns(model: Path, folder: Path, tmp_path: Path) -> None:
    """With a critic; the second and the third round are answered with what was trained."""
    rounds = 3
    found, saved = {}, []
    for deepspeed in ("none", "zero3"):
        parts: dict[str, Any] = {"method": {"type": "full"}, "stage": {"kl": {"coefficient": 0.0}}}
        train = {"workers": 2, "batch_size": 8, "learning_rate": 2e-3, "deepspeed": deepspeed}
        config = ppo_job(
            model, folder, tmp_path, deepspeed, train={**train, "max_steps": rounds * STEPS_A_ROUND}, **parts
        )
        result, found[deepspeed] = run(config)
        assert result["engines"]["version"] == rounds - 1
        saved.append(config.run_dir / "model")
    plain, zero3 = found["none"], found["zero3"]
    for key, tolerance in (("loss", 1e-4), ("reward", 1e-9), ("value_loss", 1e-3), ("grad_norm", 1e-2)):
        values = [[row[key] for row in rows] for rows in (plain, zero3)]
        assert values[1] == pytest.approx(values[0], abs=tolerance), key
    for rows in (plain, zero3):
        assert max(row["probe_difference"] for row in rows) < 1e-3
        assert max(row["mismatch"] for row in rows) < 1e-3
    base, one, other = (load_file(place / "model.safetensors") for place in (model, *saved))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - base[name]).abs().mean() > 1e-3, name
        assert (tensor - other[name]).abs().mean() < 1e-5, name
