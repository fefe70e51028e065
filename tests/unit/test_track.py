"""Trackers get the numbers of `metrics.jsonl`; what they wrote is read back from their own files."""

from __future__ import annotations

import struct
import time
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.train import track
from rayloom.train.track import MLflow, TensorBoard, Trackers, WeightsAndBiases, check_trackers, flat, kept, new_id

ROWS = [
    {"step": 5, "loss": 2.5, "grad_norm": None, "examples": {"a": 3, "b": 1}, "position": {"epoch": 0}},
    {"step": 10, "loss": 1.25, "grad_norm": 0.5, "examples": {"a": 6, "b": 2}, "position": {"epoch": 0}},
]
LOGGED = {
    (5, "loss"): 2.5,
    (5, "examples/a"): 3.0,
    (5, "examples/b"): 1.0,
    (10, "loss"): 1.25,
    (10, "grad_norm"): 0.5,
    (10, "examples/a"): 6.0,
    (10, "examples/b"): 2.0,
}


def job(*names: str) -> JobConfig:
    train = {"track": list(names)}
    return JobConfig.model_validate(
        {"name": "run", "model": {"path": "m"}, "data": {"train": ["x.jsonl"]}, "train": train}
    )


def log(tracker: Any) -> None:
    for row in ROWS:
        tracker.log(row["step"], flat(row))
    tracker.close()


def test_tensorboard(tmp_path):
    log(TensorBoard(job(), tmp_path))
    found = {}
    for file in (tmp_path / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    assert found == LOGGED


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    for rows in (ROWS[:1], ROWS[1:]):  # the second as after `resume`: in the same run
        tracker = MLflow(job(), folder)
        for row in rows:
            tracker.log(row["step"], flat(row))
        tracker.close()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("rayloom").experiment_id])
    assert (run.info.run_name, run.data.params["model.path"], run.info.status) == ("run", "m", "FINISHED")
    names = {name for _, name in LOGGED}
    found = {(m.step, name): m.value for name in names for m in client.get_metric_history(run.info.run_id, name)}
    assert found == LOGGED


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(WeightsAndBiases(job(), tmp_path))
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # `finish` tells wandb's process to close the file and does not wait until it has.
    deadline = time.monotonic() + 60
    while (found := wandb_history(file.read_bytes())) != LOGGED and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == LOGGED


def test_a_run_of_wandb_is_that_of_its_directory(tmp_path):
    """A resumed job goes on in its run; one that replaces another does not."""
    first, other = tmp_path / "first", tmp_path / "other"
    for folder in (first, other):
        folder.mkdir()
    names = [kept(folder / "wandb_run", lambda: new_id(job("wandb"), first)) for folder in (first, first, other)]
    assert names[0] == names[1] != names[2]
    older = tmp_path / "older"
    older.mkdir()
    (older / "metrics.jsonl").write_text("{}\n")  # of a version that kept no name
    assert new_id(job("wandb"), older) == new_id(job("wandb"), older)


def wandb_history(data: bytes) -> dict[tuple[int, str], float]:
    """The numbers that a .wandb file has so far, by step and name."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for record in leveldb_records(data[7:], 7):
        history = Record.FromString(record).history.item
        items = {"/".join(item.nested_key) or item.key: float(item.value_json) for item in history}
        items = {name: value for name, value in items.items() if not name.startswith("_")}
        step = int(items.pop("step", 0))
        found |= {(step, name): value for name, value in items.items()}
    return found


def leveldb_records(data: bytes, start: int) -> list[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, a record in one piece (1) or in several (2, 3, 4).

    One that is still being written is left out."""
    records, pieces, at = [], b"", 0
    while at + 7 <= len(data):
        if (left := 32768 - (at + start) % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if at + 7 + length > len(data):
            break
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(pieces)
            pieces = b""
    return records


def test_one_that_fails_is_dropped(tmp_path, monkeypatch):
    class Bad:
        def __init__(self, *args: object) -> None:
            self.rows = 0

        def log(self, step: int, numbers: object) -> None:
            self.rows += 1
            raise ConnectionError("no route to the server")

        def close(self) -> None:
            raise AssertionError("a tracker that was dropped is not closed")

    made: list[Bad] = []
    monkeypatch.setitem(track._MAKERS, "wandb", lambda job, folder: made.append(Bad()) or made[0])
    monkeypatch.setattr(track, "RayMetrics", Bad)
    said: list[str] = []
    trackers = Trackers(job("tensorboard", "wandb"), tmp_path, said.append)
    for row in ROWS:
        trackers.log(row)
    trackers.close()
    assert made[0].rows == 1
    assert "wandb gets no more metrics: ConnectionError: no route to the server" in said
    assert [*(tmp_path / "tensorboard").iterdir()]


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(track.PACKAGES, "mlflow", "no_such_package")
    with pytest.raises(RequestError, match="mlflow needs the package no_such_package; pip install 'rayloom"):
        check_trackers(job("tensorboard", "mlflow"))
    check_trackers(job("tensorboard"))
    with pytest.raises(ValueError, match="tensorboard"):
        job("visdom")
