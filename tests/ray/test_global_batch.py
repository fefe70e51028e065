"""One global batch is one curve, whoever computes it: workers, accumulation, stages of DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.ray.small_jobs import job, run, two_sets

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected")]

STEPS, GLOBAL_BATCH = 20, 8


def _losses(model: Path, folder: Path, sets: list[dict[str, Any]], **train: Any) -> list[float]:
    part = {"max_steps": STEPS, "global_batch_size": GLOBAL_BATCH, "learning_rate": 2e-3, **train}
    _, rows = run(job(model, folder, sets, data={"packing": False, "mix": "interleave_under"}, train=part))
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def one_worker(tiny_model: Path, sets: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """One worker, all rows in one batch."""
    losses = _losses(tiny_model, tmp_path_factory.mktemp("one"), sets, batch_size=GLOBAL_BATCH)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.05
    return losses


@pytest.mark.parametrize(
    "train",
    [
        {"workers": 2, "batch_size": 4},
        {"workers": 2, "batch_size": 2},  # and two batches a step
        {"batch_size": 1},
        {"workers": 2, "batch_size": 4, "deepspeed": "zero1"},
        {"workers": 2, "batch_size": 2, "deepspeed": "zero2"},
        {"workers": 2, "batch_size": 4, "deepspeed": "zero3"},
        {"workers": 2, "batch_size": 4, "deepspeed": "zero1", "offload": "optimizer"},
        {"workers": 2, "batch_size": 2, "deepspeed": "zero3", "offload": "optimizer"},
    ],
    ids=lambda train: "-".join(map(str, train.values())),
)
def test_one_curve(
    train: dict[str, Any], one_worker: list[float], tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert _losses(tiny_model, tmp_path, sets, **train) == pytest.approx(one_worker, abs=1e-5)
