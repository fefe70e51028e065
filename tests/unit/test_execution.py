"""How a job ends that a worker has refused."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayloom.errors import RequestError
from rayloom.train.execution import Execution
from rayloom.train.run_dir import RunDir

REFUSED = RequestError("rollout.max_tokens: 16: with a prompt of 90 tokens it passes the engines' length of 96")


def _ended(folder: Path, *, trains: bool, existed: bool = False) -> Exception:
    """What an execution without workers says of the refusal."""
    execution: Any = Execution.__new__(Execution)
    work = SimpleNamespace(run=RunDir(folder, existed=existed), job=SimpleNamespace(name="tune"), fleet=None)
    vars(execution).update(
        _work=work,
        _refused=REFUSED,
        _failed="rank 1 waited for rank 0",
        _trains=trains,
        _phases={"start": time.time()},
        _breaks=[],
    )
    error: Exception = execution._failure(REFUSED)
    return error


@pytest.mark.parametrize("trains", [False, True])
def test_a_refusal_takes_nothing_away_that_was_trained(tmp_path: Path, trains: bool) -> None:
    run = tmp_path / "tune"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    error = _ended(run, trains=trains)
    assert str(REFUSED) in str(error)
    assert isinstance(error, RequestError)
    assert run.exists() is trains
    if trains:
        assert (run / "metrics.jsonl").exists()
        result = json.loads((run / "result.json").read_text())
        assert (result["status"], result["error"]) == ("failed", str(REFUSED))


def test_a_refused_resume_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "tune"
    run.mkdir()
    (run / "result.json").write_text('{"status": "stopped"}')
    assert _ended(run, trains=False, existed=True) is REFUSED
    assert (run / "result.json").read_text() == '{"status": "stopped"}'
