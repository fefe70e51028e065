"""A resumed job trains with its own weight decay and clipping, whatever the checkpoint's optimizer remembers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.ray.small_jobs import job, run, write_rows

from rayloom.config.job import JobConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected"), pytest.mark.timeout(600)]


@pytest.mark.parametrize("engine", ["none", "zero2"])
def test_a_changed_setting_counts_from_the_checkpoint_on(engine: str, tiny_model: Path, tmp_path: Path) -> None:
    sets = [{"path": str(write_rows(tmp_path / "rows.jsonl", 40))}]

    def config(name: str, **train: Any) -> JobConfig:
        part = {"max_steps": 6, "save_steps": 3, "scheduler": "constant", "warmup": 0, "deepspeed": engine}
        return job(tiny_model, tmp_path, sets, name=name, train=part | train)

    first = config("first", max_steps=3)
    run(first)

    def losses(name: str, **train: Any) -> list[float]:
        resumed = config(name, **train).model_copy(update={"resume": True})
        shutil.copytree(first.run_dir, resumed.run_dir)
        _, rows = run(resumed)
        assert [row["step"] for row in rows] == list(range(1, 7))
        return [row["loss"] for row in rows]

    same = losses("same")
    decayed, clipped = losses("decayed", weight_decay=20.0), losses("clipped", max_grad_norm=1e-4)
    for changed in (decayed, clipped):
        assert changed[:4] == pytest.approx(same[:4], abs=1e-6)  # the fourth is of the weights of the checkpoint
        assert all(abs(after - before) > 1e-4 for after, before in zip(changed[4:], same[4:], strict=True))


def test_a_checkpoint_is_not_written_again(tiny_model: Path, tmp_path: Path) -> None:
    """A run that was killed between its last checkpoint and its result has no step left to make. Were the checkpoint
    written again over itself, one that broke off would cost it."""
    sets = [{"path": str(write_rows(tmp_path / "rows.jsonl", 40))}]
    config = job(tiny_model, tmp_path, sets, train={"max_steps": 4, "save_steps": 2})
    run(config)
    config.run_dir.joinpath("result.json").unlink()
    shutil.rmtree(config.run_dir / "model")
    files = sorted((config.run_dir / "checkpoints").glob("step-*/**/*"))
    before = {file: file.stat().st_mtime_ns for file in files}
    assert before
    result, rows = run(config.model_copy(update={"resume": True}))
    assert (result["status"], result["steps"], len(rows)) == ("finished", 4, 4)
    assert (config.run_dir / "model" / "adapter_model.safetensors").exists()
    files = sorted((config.run_dir / "checkpoints").glob("step-*/**/*"))
    assert {file: file.stat().st_mtime_ns for file in files} == before
