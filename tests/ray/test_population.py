"""Populations of a tiny model: what a trial takes over is a real checkpoint; neither the clock nor a kill counts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.ray.small_jobs import job, metrics, run, write_rows

from rayloom.config.document import Document, dump_document
from rayloom.config.job import JobConfig
from rayloom.config.read import read_job
from rayloom.search.population import history
from rayloom.search.results import read_ledger
from rayloom.search.run import run_search

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected"), pytest.mark.timeout(900)]

STEPS, RUNGS = 24, (6, 12, 18)
TRAIN = {"max_steps": STEPS, "scheduler": "constant", "warmup": 0.0, "keep_checkpoints": 1}
SEARCH = {
    "metric": "loss",
    "scheduler": "population",
    "interval": 0.25,
    "samples": 3,
    "seed": 3,
    "space": {"train.learning_rate": "loguniform(1e-6, 3e-2)", "train.weight_decay": "uniform(0, 0.5)"},
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [{"path": str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60))}]


def document(model: Path, output: Path, sets: list[dict[str, Any]], **search: Any) -> Document:
    data = job(model, output, sets, name="search", train=TRAIN).model_dump(mode="json")
    return Document("job.yaml", {**data, "search": {**SEARCH, **search}})


@pytest.fixture(scope="module")
def whole(
    tiny_model: Path, sets: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, connected: Any
) -> dict[str, Any]:
    """The ledger of a population whose trials take turns, one at a time."""
    return run_search(document(tiny_model, tmp_path_factory.mktemp("whole"), sets, concurrent=1))


def exploits(ledger: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(ledger["exploits"], key=lambda exploit: (exploit["rung"], exploit["trial"]))


def by_name(ledger: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(ledger["trials"], key=lambda trial: str(trial["name"]))


def job_of(trial: dict[str, Any]) -> JobConfig:
    return read_job(Path(trial["run_dir"]) / "job.yaml")


def test_the_worst_goes_on_from_the_best(whole: dict[str, Any]) -> None:
    assert [trial["status"] for trial in whole["trials"]] == ["finished"] * 3
    assert {exploit["rung"] for exploit in whole["exploits"]} == {1, 2, 3}
    assert whole["decided"] == 3
    for exploit in whole["exploits"]:
        values = {
            trial["name"]: rungs[str(exploit["rung"])]["value"]
            for trial in whole["trials"]
            if str(exploit["rung"]) in (rungs := trial["rungs"])
        }
        assert values[exploit["from"]] == min(values.values())
        assert exploit["step"] == RUNGS[exploit["rung"] - 1]
        assert exploit["new"] != exploit["old"]
    folder = Path(whole["trials"][0]["run_dir"]).parents[1]
    assert not (folder / "population").exists(), "what was kept for others is deleted"
    assert not [path for path in (folder / "trials").iterdir() if path.name.startswith(".")]
    best = next(trial for trial in whole["trials"] if trial["name"] == whole["best"])
    assert best["value"] == min(trial["value"] for trial in whole["trials"])
    for key, value in best["values"].items():
        assert getattr(read_job(folder / "best.yaml").train, key.removeprefix("train.")) == value


def test_what_a_trial_did_can_be_done_by_hand(whole: dict[str, Any], tmp_path: Path) -> None:
    """By jobs that are ended and resumed with the values that `search.json` tells: losses and weights are the same."""
    for trial in whole["trials"]:
        parts = history(whole, trial["name"])
        ends = [part["step"] for part in parts[1:]] + [STEPS]
        for part, end in zip(parts, ends, strict=True):
            values = {key.removeprefix("train."): value for key, value in part["values"].items()}
            own = job_of(trial)
            train = own.train.model_copy(update={**values, "max_steps": end, "save_steps": 500})
            place = {"name": trial["name"], "output_dir": str(tmp_path), "resume": part["step"] > 0}
            hand = own.model_copy(update={**place, "train": train})
            run(hand)
        losses = [(row["step"], row["loss"], row["learning_rate"]) for row in metrics(hand)]
        assert [(row["step"], row["loss"], row["learning_rate"]) for row in metrics(job_of(trial))] == losses
        assert [step for step, *_ in losses] == list(range(1, STEPS + 1))
        weights = [load_file(folder / "model" / "adapter_model.safetensors") for folder in (hand.run_dir, _dir(trial))]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    taken = [trial for trial in whole["trials"] if len(history(whole, trial["name"])) > 1]
    assert taken, "else nothing was shown"


def _dir(trial: dict[str, Any]) -> Path:
    return Path(trial["run_dir"])


def test_side_by_side_it_comes_to_the_same(
    whole: dict[str, Any], tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    """With fewer threads for each, so that sums are rounded elsewhere; who takes over whom is the same."""
    ledger = run_search(document(tiny_model, tmp_path, sets))
    assert exploits(ledger) == exploits(whole)
    for one, other in zip(by_name(ledger), by_name(whole), strict=True):
        assert one["values"] == other["values"]
        assert one["value"] == pytest.approx(other["value"], rel=1e-4)


def test_a_population_goes_on_after_a_kill(
    whole: dict[str, Any], tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Killed after the first rung was decided; it ends as if it had not been."""
    file = tmp_path / "job.yaml"
    data = document(tiny_model, tmp_path, sets).data
    file.write_text(dump_document(data))
    process = subprocess.Popen(
        [sys.executable, "-m", "rayloom", "tune", str(file)], env=dict(os.environ), start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not read_ledger(tmp_path / "search").get("exploits"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    ledger = run_search(Document("job.yaml", {**data, "resume": True}))
    assert [trial["status"] for trial in ledger["trials"]] == ["finished"] * 3
    assert exploits(ledger) == exploits(whole)
    assert json.loads((tmp_path / "search" / "search.json").read_text())["best"] == whole["best"]
    for trial in ledger["trials"]:
        steps = [row["step"] for row in metrics(job_of(trial))]
        assert steps == list(range(1, STEPS + 1))
    shutil.rmtree(tmp_path / "search")
