"""A job goes on by itself when processes die: the curve and the weights are those of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.ray.small_jobs import job, metrics, run, write_rows

from rayloom.config.job import JobConfig
from rayloom.errors import JobError
from rayloom.jobs.local_head import LocalHead

pytestmark = [pytest.mark.usefixtures("connected"), pytest.mark.timeout(600)]

STEPS, KILL_AT, EARLIEST = 30, 17, 5  # a checkpoint counts when Ray Train has looked, which it does every two seconds


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [{"path": str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 200))}]


def long_job(model: Path, output: Path, sets: list[dict[str, Any]], name: str, **train: Any) -> JobConfig:
    slow = {"batch_size": 8, "gradient_accumulation": 6}  # a third of a second for a step
    part = {"max_steps": STEPS, "save_steps": 5, "learning_rate": 1e-3, **slow, **train}
    return job(model, output, sets, name=name, train=part)


@pytest.fixture(scope="module")
def undisturbed(
    tiny_model: Path, sets: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, connected: Any
) -> JobConfig:
    config = long_job(tiny_model, tmp_path_factory.mktemp("undisturbed"), sets, "whole")
    run(config)
    return config


def processes(head: LocalHead, title: str) -> list[psutil.Process]:
    """Ray's processes under a head whose title says this."""
    found = []
    for process in psutil.Process(head._process.pid).children(recursive=True):
        try:
            if any(title in part for part in process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def at_step(config: JobConfig, step: int, act: Callable[[], None]) -> Iterator[None]:
    """Do something when the job's metrics have come to a step."""
    done = threading.Event()

    def watch() -> None:
        file, deadline = config.run_dir / "metrics.jsonl", time.monotonic() + 400
        while time.monotonic() < deadline:
            if file.exists() and any(f'"step": {step},' in line for line in file.read_text().splitlines()):
                act()
                done.set()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join(1)
    assert done.is_set(), f"the job never came to step {step}"


def kill(head: LocalHead, title: str) -> None:
    for process in processes(head, title):
        os.kill(process.pid, signal.SIGKILL)


def same_run(one: JobConfig, other: JobConfig) -> None:
    losses = [[(row["step"], row["loss"], row["grad_norm"]) for row in metrics(config)] for config in (one, other)]
    assert losses[0] == losses[1]
    weights = [load_file(config.run_dir / "model" / "adapter_model.safetensors") for config in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("title", ["RayTrainWorker", pytest.param("TrainController", marks=pytest.mark.slow)])
def test_a_process_dies(
    title: str, head: LocalHead, undisturbed: JobConfig, tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = long_job(tiny_model, tmp_path, sets, "killed")
    with at_step(config, KILL_AT, lambda: kill(head, title)):
        result, _ = run(config)
    (event,) = result["breaks"]
    assert event["kind"] == "fault"
    assert EARLIEST <= event["from_step"] < STEPS
    assert event["seconds"] > 0
    same_run(undisturbed, config)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["none", "zero2"])  # DeepSpeed's collectives have groups of their own
def test_a_worker_that_hangs(
    deepspeed: str,
    head: LocalHead,
    undisturbed: JobConfig,
    tiny_model: Path,
    sets: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """The other one waits for it no longer than it is told to, and the job goes on without it."""
    stopped: list[psutil.Process] = []

    def stop() -> None:
        stopped.append(processes(head, "RayTrainWorker")[0])
        stopped[0].suspend()

    two = {"workers": 2, "batch_size": 4, "collective_timeout": 10, "deepspeed": deepspeed}
    config = long_job(tiny_model, tmp_path, sets, "hung", **two)
    try:
        with at_step(config, KILL_AT, stop):
            result, _ = run(config)
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    (event,) = result["breaks"]
    assert "lost the connection to the others" in event["what"]
    assert event["seconds"] > 0
    losses = [[row["loss"] for row in metrics(one)] for one in (undisturbed, config)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.slow
def test_steps_that_are_skipped(
    tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate at which weights run out of numbers: the job ends all the same, and says which steps were not made."""
    broken = {"learning_rate": 1e30, "max_grad_norm": None, "max_steps": 6, "warmup": 0.0, "on_bad_step": "skip"}
    broken["max_loss"] = 1e300
    result, _ = run(long_job(tiny_model, tmp_path, sets, "skipped", **broken))
    assert (result["status"], result["steps"]) == ("finished", 6)
    assert 4 <= result["skipped_steps"] <= 5
    said = capsys.readouterr().out
    assert re.search(r"step 6: the (loss is|gradient is not a number) .*, and no step was made with it", said)
    assert said.count("The rows of ") >= result["skipped_steps"]


@pytest.mark.slow
def test_large_losses_are_skipped_whoever_computes_them(
    tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the loss of the whole step that counts: two workers and one leave the same steps out."""
    still = {"learning_rate": 1e-6, "max_steps": 10}  # so that the losses are those of the rows, whatever is left out
    _, rows = run(long_job(tiny_model, tmp_path, sets, "all", **still))
    ordered = sorted(row["loss"] for row in rows)
    limit = {**still, "max_loss": (ordered[4] + ordered[5]) / 2, "on_bad_step": "skip"}
    found = []
    for name, workers in {"one": {}, "two": {"workers": 2, "batch_size": 4}}.items():
        result, _ = run(long_job(tiny_model, tmp_path, sets, name, **limit, **workers))
        said = re.findall(r"step (\d+): the loss is (\S+), and the most that it may be", capsys.readouterr().out)
        found.append({int(step): float(loss) for step, loss in said})
        assert result["skipped_steps"] == len(found[-1])
    assert len(found[0]) == 5
    assert found[0].keys() == found[1].keys()
    assert list(found[1].values()) == pytest.approx(list(found[0].values()), abs=1e-3)


@pytest.mark.slow
def test_it_gives_up(head: LocalHead, tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    config = long_job(tiny_model, tmp_path, sets, "given-up", max_failures=0)
    with (
        at_step(config, KILL_AT, lambda: kill(head, "RayTrainWorker")),
        pytest.raises(JobError, match=r"worker 0 died.*It was failure 1; train.max_failures is 0[\s\S]*resume=true"),
    ):
        run(config)
    result = json.loads((config.run_dir / "result.json").read_text())
    assert (result["status"], result["breaks"]) == ("failed", [])
