"""A run directory on object storage: a run that was killed goes on from there, on a machine that has nothing of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.object_storage import BUCKET, StorageServer, storage_server
from tests.ray.small_jobs import job, metrics, run, write_rows

from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job
from rayloom.remote import Remote
from rayloom.train.checkpoints import SNAPSHOT
from rayloom.train.driver import run_job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected"), pytest.mark.timeout(600)]

STEPS, KILL_AT = 40, 17


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageServer]:
    """Started after Ray, whose processes know nothing of its keys but what a job brings."""
    with storage_server(tmp_path_factory.mktemp("server") / "log") as started:
        yield started


@pytest.fixture
def sets(tmp_path: Path) -> list[dict[str, Any]]:
    return [{"path": str(write_rows(tmp_path / "rows.jsonl", 200))}]


def make(model: Path, output: str | Path, sets: list[dict[str, Any]], **train: Any) -> JobConfig:
    slow = {"batch_size": 8, "gradient_accumulation": 4, "max_steps": STEPS, "save_steps": 5}
    return job(model, output, sets, train={**slow, "keep_checkpoints": 2, "learning_rate": 1e-3, **train})


def start(config: JobConfig, folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """The command in a process of its own, with a temporary folder that can be taken away."""
    file, scratch = folder / "job.yaml", folder / "scratch"
    file.write_text(dump_job(config), encoding="utf-8")
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "rayloom", "train", str(file), *overrides]
    log = (folder / "log").open("ab")
    return subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}, cwd=folder, stderr=log)


def rows_at(place: Remote) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place.read("metrics.jsonl") or b"").splitlines()]


def steps_at(place: Remote) -> set[str]:
    return {name for name in (place / "checkpoints").names() if name.startswith("step-")}


def test_a_killed_run_goes_on_elsewhere(
    server: StorageServer, tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    whole = make(tiny_model, tmp_path / "whole", sets)
    run(whole)
    config = make(tiny_model, f"s3://{BUCKET}/runs", sets)
    place = Remote.at(config.run_place)
    process = start(config, tmp_path)
    deadline = time.monotonic() + 200
    while True:  # until a checkpoint counts, and some steps more
        assert process.poll() is None
        assert time.monotonic() < deadline
        rows = rows_at(place)
        if rows and rows[-1]["step"] >= KILL_AT and (place / "checkpoints").read(SNAPSHOT):
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    shutil.rmtree(tmp_path / "scratch")
    time.sleep(3)  # Ray ends what the driver has left
    rows = rows_at(place)
    assert rows[-1]["step"] < STEPS
    assert place.read("result.json") is None
    # An upload that broke off: all of a checkpoint may be there, but nothing says that it is whole.
    newest = max(steps_at(place))
    (place / "checkpoints" / newest).download(tmp_path / "broken")
    (place / "checkpoints" / "step-00000038").upload(tmp_path / "broken")

    process = start(config, tmp_path, "resume=true")
    assert process.wait(timeout=200) == 0
    result = json.loads(place.read("result.json") or b"")
    assert (result["status"], result["steps"], result["breaks"]) == ("finished", STEPS, [])
    assert result["model_dir"] == f"s3://{BUCKET}/runs/run/model"
    numbers = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in part] for part in (metrics(whole), rows_at(place))
    ]
    assert numbers[0] == numbers[1]
    weights = [
        load_file(folder / "adapter_model.safetensors")
        for folder in (whole.run_dir / "model", (place / "model").download(tmp_path / "model"))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert steps_at(place) == {"step-00000035", "step-00000040"}
    assert place.names() >= {"job.yaml", "data.json", "metrics.jsonl", "result.json", "loss.png", "model"}
    assert not [*(tmp_path / "scratch").glob("rayloom-run-*")]


def test_two_workers_keep_the_best_there(
    server: StorageServer, tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Sharded, each worker writes its own files; what a run of the same job keeps on a disk is what is there."""
    part = {"workers": 2, "batch_size": 4, "deepspeed": "zero2", "max_steps": 12, "save_steps": 4, "eval_steps": 4}
    part |= {"best_metric": "eval_loss", "keep_checkpoints": 1}
    data = {"held_out": 0.2}
    configs = [
        job(tiny_model, output, sets, data=data, train=part) for output in (tmp_path / "disk", f"s3://{BUCKET}/two")
    ]
    results = [run_job(config, started=time.time()) for config in configs]
    place = Remote.at(configs[1].run_place)
    assert results[0]["best"] == results[1]["best"]
    assert [(row["step"], row["loss"]) for row in metrics(configs[0]) if "loss" in row] == [
        (row["step"], row["loss"]) for row in rows_at(place) if "loss" in row
    ]
    kept = {path.name for path in configs[0].run_dir.glob("checkpoints/step-*")}
    assert steps_at(place) == kept
    newest = max(kept)
    there = (place / "checkpoints" / newest).download(tmp_path / "newest")
    files = [{file.relative_to(one).as_posix() for file in one.rglob("*") if file.is_file()}
             for one in (configs[0].run_dir / "checkpoints" / newest, there)]  # fmt: skip
    assert files[0] == files[1]
    weights = [
        load_file(folder / "adapter_model.safetensors")
        for folder in (configs[0].run_dir / "model", (place / "model").download(tmp_path / "model"))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_storage_that_goes_away(tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    """The job ends with the address and the reason, and what could not be written there is kept."""
    with storage_server(tmp_path / "server-log") as own:
        config = make(tiny_model, f"s3://{BUCKET}/gone", sets, max_steps=400)
        place = Remote.at(config.run_place)
        process = start(config, tmp_path)
        deadline = time.monotonic() + 200
        while not (rows := rows_at(place)) or rows[-1]["step"] < KILL_AT:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        own.process.kill()
        assert process.wait(timeout=300) == 1
    said = (tmp_path / "log").read_text()
    assert f"s3://{BUCKET}/gone" in said
    assert "Traceback" not in said
    kept = Path(said.split("is kept in ")[1].split()[0])
    steps = [json.loads(row)["step"] for row in (kept / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= KILL_AT
