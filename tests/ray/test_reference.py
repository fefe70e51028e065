"""Reference log-probabilities that are kept on disk: the same losses as with a second copy of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.ray import test_judgements, test_preferences
from tests.ray.small_jobs import job, run

from rayloom.config.job import JobConfig

pytestmark = pytest.mark.usefixtures("connected")
sets = test_preferences.sets
judged = pytest.fixture(scope="module", name="judged")(test_judgements.sets.__wrapped__)


def both(
    model: Path, folder: Path, data: list[dict[str, Any]], stage: dict[str, Any], method: dict[str, Any], **train: Any
) -> tuple[JobConfig, JobConfig]:
    """The same job with a copy, on one worker without DeepSpeed, and with what is cached."""
    part = {"max_steps": 6, "batch_size": 4, "eval_steps": 3, "learning_rate": 3e-3}
    parts: dict[str, Any] = {"data": {"held_out": 0.2}, "method": method}
    copy = job(model, folder, data, "copy", stage=stage | {"reference": "copy"}, train=part, **parts)
    cached = job(model, folder, data, "cached", stage=stage | {"reference": "cached"}, train=part | train, **parts)
    return copy, cached


def same_numbers(one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float) -> None:
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for key in ("loss", "rewards/margin", "eval_loss", "eval_rewards/margin", "divergence", "eval_divergence"):
        values = [[row[key] for row in rows if key in row] for rows in (one, other)]
        assert values[1] == pytest.approx(values[0], abs=tolerance), key


def test_training_all_weights(
    tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, cached = both(tiny_model, tmp_path, sets, {"type": "dpo"}, {"type": "full"})
    _, expected = run(copy)
    _, found = run(cached)
    same_numbers(expected, found, 1e-6)
    assert "rows in" in capsys.readouterr().out
    _, again = run(cached.model_copy(update={"name": "again"}))
    assert f"reference log-probabilities are read from {tmp_path}/reference/" in capsys.readouterr().out
    same_numbers(expected, again, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "method", "train"),
    [
        ({"loss": "ipo", "ld_alpha": 0.5}, {"type": "lora", "init": "pissa"}, {"workers": 2, "global_batch_size": 4}),
        ({}, {"type": "freeze", "last": 1}, {"workers": 2, "global_batch_size": 4, "deepspeed": "zero2"}),
        ({}, {"type": "full"}, {"workers": 2, "global_batch_size": 4, "deepspeed": "zero3"}),
        ({}, {"type": "lora"}, {"workers": 2, "global_batch_size": 4, "deepspeed": "zero3", "offload": "all"}),
    ],
    ids=["pissa", "freeze-zero2", "zero3", "offloaded"],
)
def test_methods_and_engines(
    stage: dict[str, Any],
    method: dict[str, Any],
    train: dict[str, Any],
    tiny_model: Path,
    sets: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    train = train | {"batch_size": 2}
    copy, cached = both(tiny_model, tmp_path, sets, {"type": "dpo", **stage}, method, **train)
    same_numbers(run(copy)[1], run(cached)[1], 1e-5)


@pytest.mark.slow
def test_judgements_and_a_run_that_goes_on(
    tiny_model: Path, judged: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed with more steps than were computed, when the model is no longer the reference."""
    two = {"workers": 2, "batch_size": 2, "global_batch_size": 4}
    copy, cached = both(tiny_model, tmp_path, judged, {"type": "kto"}, {"type": "full"}, **two)
    plain = {"scheduler": "constant", "warmup": 0.0}  # what remains the same when the steps become more

    def told(config: JobConfig, **more: Any) -> JobConfig:
        return config.model_copy(update={"train": config.train.model_copy(update=plain | more)})

    run(told(cached, max_steps=3))
    capsys.readouterr()
    _, resumed = run(told(cached).model_copy(update={"resume": True}))
    assert "reference log-probabilities of" in capsys.readouterr().out
    _, expected = run(told(copy))
    same_numbers([row for row in expected if "loss" in row], [row for row in resumed if "loss" in row], 1e-5)
