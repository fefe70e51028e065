"""Searches with a tiny model: bad trials are stopped early, failed ones reported, and a killed search goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.ray.small_jobs import job, write_rows

from rayloom.config.document import Document, dump_document
from rayloom.config.read import read_job
from rayloom.errors import JobError, RequestError
from rayloom.search.run import run_search

pytestmark = [pytest.mark.usefixtures("connected"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [{"path": str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60))}]


def document(model: Path, output: Path, sets: list[dict[str, Any]], search: dict[str, Any], **parts: Any) -> Document:
    data = job(model, output, sets, name="search", **parts).model_dump(mode="json")
    return Document("job.yaml", {**data, "search": {"metric": "loss", **search}})


@pytest.mark.slow
def test_a_bad_trial_is_stopped_early(tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    """Three rates, of which one learns; another cannot train at all. ASHA ends the one that does not learn."""
    search = {
        "searcher": "grid",
        "scheduler": "asha",
        "concurrent": 1,
        "grace": 0.05,
        "reduction": 2,
        "space": {"train.learning_rate": "grid(1e-2, 1e-8)", "method.target": {"choice": ["all", ["no_such"]]}},
    }
    part = {"max_steps": 200, "scheduler": "constant", "warmup": 0.0, "save_steps": 1000}
    ledger = run_search(document(tiny_model, tmp_path, sets, search, train=part))
    status = {
        (trial["values"]["train.learning_rate"], str(trial["values"]["method.target"])): trial
        for trial in ledger["trials"]
    }
    good, bad = status[1e-2, "all"], status[1e-8, "all"]
    assert (good["status"], bad["status"]) == ("finished", "stopped early")
    assert bad["step"] < 200
    failed = [trial for trial in ledger["trials"] if trial["status"] == "failed"]
    assert len(failed) == 2
    assert all("no_such" in trial["error"] for trial in failed)
    # The stopped trial's run directory is that of any stopped job: a result, a checkpoint, and rows up to it.
    folder = Path(bad["run_dir"])
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "stopped"
    assert result["steps"] < 200
    assert (folder / "checkpoints" / f"step-{result['steps']:08d}").is_dir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == result["steps"]
    best = read_job(tmp_path / "search" / "best.yaml")
    assert (best.train.learning_rate, best.search, best.name) == (1e-2, None, "search-best")
    assert (tmp_path / "search" / "search.png").stat().st_size > 10_000
    assert ledger["best"] == good["name"]
    with pytest.raises(RequestError, match="is finished; nothing is left to do"):
        run_search(document(tiny_model, tmp_path, sets, search, resume=True, train=part))


def test_a_metric_that_never_comes(tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    """Told at the first report: so many steps would take longer than the test may."""
    search = {"metric": "lss", "samples": 2, "concurrent": 1, "space": {"train.learning_rate": "uniform(1e-4, 1e-3)"}}
    with pytest.raises(RequestError, match=r"the job never reports lss; it reports step, epoch, progress, loss"):
        run_search(document(tiny_model, tmp_path, sets, search, train={"max_steps": 50_000}))
    assert not (tmp_path / "search").exists()


def test_more_than_the_cluster_has(tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    search = {"samples": 2, "space": {"train.workers": "choice(1, 9)"}}
    with pytest.raises(
        RequestError, match=r"train\.workers: the job asks for 9 workers .* the cluster has not got that"
    ):
        run_search(document(tiny_model, tmp_path, sets, search))
    assert not (tmp_path / "search").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told"])
def test_a_search_goes_on(number: signal.Signals, tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    """Ended while its second trial trains: the first is not run again, the second goes on from its checkpoint."""
    search = {"searcher": "grid", "concurrent": 1, "space": {"train.learning_rate": "grid(1e-2, 1e-3, 1e-4)"}}
    part = {"max_steps": 120, "save_steps": 10}
    whole = document(tiny_model, tmp_path, sets, search, train=part)
    file = tmp_path / "job.yaml"
    file.write_text(dump_document(whole.data))
    folder = tmp_path / "search"
    process = subprocess.Popen(
        [sys.executable, "-m", "rayloom", "tune", str(file)], env=dict(os.environ), start_new_session=True
    )
    checkpoints = folder / "trials" / "search-0002" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("step-*/stream.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(number)
    process.wait(240)
    first = (folder / "trials" / "search-0001" / "result.json").read_text()
    assert json.loads(first)["status"] == "finished"
    ledger = run_search(Document("job.yaml", {**whole.data, "resume": True}))
    assert [trial["status"] for trial in ledger["trials"]] == ["finished"] * 3
    assert (folder / "trials" / "search-0001" / "result.json").read_text() == first
    rows = (folder / "trials" / "search-0002" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 121))


@pytest.mark.slow
@pytest.mark.parametrize("searcher", ["optuna", "hyperopt"])
def test_a_searcher(searcher: str, tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip(searcher)
    space = {
        "train.learning_rate": "loguniform(1e-5, 1e-2)",
        "train.batch_size": "randint(1, 2)",
        "method": {"choice": [{"type": "lora", "rank": 4}, {"type": "full"}]},
    }
    search = {"searcher": searcher, "scheduler": "median", "samples": 3, "concurrent": 1, "space": space}
    ledger = run_search(document(tiny_model, tmp_path, sets, search, train={"max_steps": 6}))
    assert [trial["name"] for trial in ledger["trials"]] == ["search-0001", "search-0002", "search-0003"]
    assert all(trial["status"] in ("finished", "stopped early") for trial in ledger["trials"])
    for trial in ledger["trials"]:
        of_trial = read_job(Path(trial["run_dir"]) / "job.yaml")
        assert of_trial.train.learning_rate == trial["values"]["train.learning_rate"]
        assert of_trial.method.type == trial["values"]["method"]["type"]


@pytest.mark.slow
def test_every_trial_fails(tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    bad = {"samples": 1, "space": {"train.learning_rate": "uniform(1e30, 1e31)"}}
    with pytest.raises(JobError, match="every trial failed"):
        run_search(document(tiny_model, tmp_path, sets, bad, train={"max_steps": 20, "max_grad_norm": None}))
