"""The best evaluation's checkpoint is kept and becomes the model; a full disk costs no checkpoint."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.ray.small_jobs import job, metrics, run, write_rows

from rayloom.config.job import JobConfig
from rayloom.errors import JobError
from rayloom.train.checkpoints import SNAPSHOT

pytestmark = pytest.mark.usefixtures("connected")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [{"path": str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60))}]


def _answers(path: Path, rows: int, words: str) -> dict[str, Any]:
    """A data set whose answers have these words only."""
    generator = random.Random(path.stem)
    said = [" ".join(generator.choices(words.split(), k=8)) for _ in range(rows)]
    path.write_text("".join(json.dumps({"instruction": f"{n}?", "output": one}) + "\n" for n, one in enumerate(said)))
    return {"path": str(path)}


@pytest.mark.parametrize(
    "train",
    [{}, pytest.param({"workers": 2, "batch_size": 1, "deepspeed": "zero3"}, marks=pytest.mark.slow)],
    ids=["one", "zero3"],
)
def test_the_best_is_kept(train: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """How answers look is learnt first, then that they never have the words of the evaluation: three evaluations after
    the best, each clearly worse, end the job."""
    sets = [_answers(tmp_path / "learnt.jsonl", 60, "river stone lamp cloud seven garden window")]
    data = {"eval": [_answers(tmp_path / "asked.jsonl", 12, "quiet paper winter bridge candle music orange")]}
    method = {"type": "lora", "extra_modules": ["lm_head"]}
    part = {"learning_rate": 5e-3, "scheduler": "constant", "warmup": 0.0, "max_steps": 40, "save_steps": 4}
    part |= {"eval_steps": 2, "best_metric": "eval_loss", "early_stopping": 3, "keep_checkpoints": 2, **train}
    config = job(tiny_model, tmp_path, sets, data=data, method=method, train=part)
    result, rows = run(config)
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    step = min(losses, key=lambda at: losses[at])
    assert result["best"] == {"metric": "eval_loss", "value": losses[step], "step": step, "of_steps": step + 6}
    assert (result["status"], result["stopped_early"], max(losses)) == ("finished", True, step + 6)
    kept = sorted(path.name for path in (config.run_dir / "checkpoints").glob("step-*"))
    assert f"step-{step:08d}" in kept
    saved = load_file(config.run_dir / "model" / "adapter_model.safetensors")
    if "deepspeed" not in train:
        of_best = load_file(config.run_dir / "checkpoints" / f"step-{step:08d}" / "adapter_model.safetensors")
        assert all(torch.equal(saved[name], of_best[name]) for name in of_best)
    again = job(tiny_model, tmp_path, sets, name="short", data=data, method=method, train={
        **part, "max_steps": step, "best_metric": None, "early_stopping": None
    })  # fmt: skip
    run(again)  # trains as far as the best evaluation and no further
    plain = load_file(again.run_dir / "model" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_of_equal_evaluations_the_first_is_kept(tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    """At a rate of nothing all are equal; Ray would keep the later ones."""
    still = {"learning_rate": 1e-30, "scheduler": "constant", "max_steps": 8, "save_steps": 2, "eval_steps": 2}
    part = {**still, "best_metric": "eval_loss", "keep_checkpoints": 2}
    config = job(tiny_model, tmp_path, sets, data={"held_out": 0.2}, train=part)
    result, rows = run(config)
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses == [losses[0]] * 4
    assert result["best"] == {"metric": "eval_loss", "value": losses[0], "step": 2, "of_steps": 8}
    kept = sorted(path.name for path in (config.run_dir / "checkpoints").glob("step-*"))
    assert kept == ["step-00000002", "step-00000008"]
    assert (config.run_dir / "model" / "adapter_model.safetensors").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes of storage."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]).returncode:
        pytest.skip("a disk that can be filled takes the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_a_full_disk(small_disk: Path, tiny_model: Path, sets: list[dict[str, Any]]) -> None:
    """What there is stays, the message names the folder, and with room again the job goes on."""
    config = job(tiny_model, small_disk, sets, train={"max_steps": 2, "save_steps": 2})
    run(config)
    filler = small_disk / "filler"
    disk = os.statvfs(small_disk)
    filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - 65536))  # room for some lines, not for a checkpoint
    more = job(tiny_model, small_disk, sets, resume=True, train={"max_steps": 6, "save_steps": 2})
    with pytest.raises(
        JobError, match=r"the checkpoint step-00000004 cannot be written to .*checkpoints: .*[Nn]o space"
    ):
        run(more)
    assert [path.name for path in (config.run_dir / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert json.loads((config.run_dir / "checkpoints" / SNAPSHOT).read_text())
    assert "No space" in json.loads((config.run_dir / "result.json").read_text())["error"]
    filler.unlink()
    result, _ = run(more)
    assert result["steps"] == 6
    assert [row["step"] for row in metrics(more)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_list_that_broke_off(tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    def config(steps: int, **more: Any) -> JobConfig:
        return job(tiny_model, tmp_path, sets, train={"max_steps": steps, "save_steps": 2}, **more)

    run(config(4))
    snapshot = tmp_path / "run" / "checkpoints" / SNAPSHOT
    snapshot.write_text(snapshot.read_text()[:100])
    result, rows = run(config(6, resume=True))
    assert (result["steps"], [row["step"] for row in rows]) == (6, [1, 2, 3, 4, 5, 6])
