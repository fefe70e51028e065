"""A run goes on with another number of workers under ZeRO: the same rows and the curve of a run that never stopped."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.ray.small_jobs import job, run, write_rows

from rayloom.config.job import JobConfig

pytestmark = pytest.mark.usefixtures("connected")

STEPS, STOP = 10, 5


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [{"path": str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 120))}]


def part_of_a_job(
    model: Path, folder: Path, sets: list[dict[str, Any]], method: str, steps: int, **more: Any
) -> JobConfig:
    """What stays the same when the steps become more: a constant rate, a global batch."""
    train = {"max_steps": steps, "global_batch_size": 4, "scheduler": "constant", "warmup": 0.0, "weight_decay": 0.1}
    train |= {"learning_rate": 3e-3} | more.pop("train")
    return job(model, folder, sets, method={"type": method}, train=train, **more)


@pytest.fixture(scope="module")
def alone(
    tiny_model: Path, sets: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, connected: Any
) -> Callable[[str], list[dict[str, Any]]]:
    """The metrics of one worker without DeepSpeed, which is never stopped, for a method."""

    @cache
    def metrics(method: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(method)
        return run(part_of_a_job(tiny_model, folder, sets, method, STEPS, train={"batch_size": 2}))[1]

    return metrics


@pytest.mark.parametrize(
    ("engine", "before", "after", "method"),
    [
        ("zero2", 2, 1, "lora"),
        pytest.param("zero1", 2, 1, "full", marks=pytest.mark.slow),
        pytest.param("zero2", 1, 2, "lora", marks=pytest.mark.slow),
        pytest.param("zero2", 1, 2, "full", marks=pytest.mark.slow),
        pytest.param("zero3", 2, 1, "lora", marks=pytest.mark.slow),
        pytest.param("zero3", 1, 2, "lora", marks=pytest.mark.slow),
        pytest.param("zero3", 2, 1, "full", marks=pytest.mark.slow),
    ],
)
def test_the_curve_is_that_of_an_uninterrupted_run(
    engine: str,
    before: int,
    after: int,
    method: str,
    alone: Callable[[str], list[dict[str, Any]]],
    tiny_model: Path,
    sets: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    expected = alone(method)
    train = {"deepspeed": engine, "batch_size": 2, "workers": before}
    run(part_of_a_job(tiny_model, tmp_path, sets, method, STOP, train=train))
    train["workers"] = after
    result, found = run(part_of_a_job(tiny_model, tmp_path, sets, method, STEPS, train=train, resume=True))
    assert result["engine"]["zero_stage"] == int(engine[-1])
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], abs=1e-4)
    assert [row["position"] for row in found] == [row["position"] for row in expected]
