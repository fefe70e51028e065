"""Where else the rows of metrics go: TensorBoard, Weights & Biases, MLflow, and Ray's own metrics.

The driver alone holds the trackers. Each takes flat numbers by name, the same that `metrics.jsonl` has; one that fails
is dropped with a word, and the job goes on.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError, first_line
from rayloom.train.gauges import Gauges

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""What each tracker of `train.track` needs."""


class Tracker(Protocol):
    """Takes rows until it is closed."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_trackers(job: JobConfig) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        RequestError: naming the package.
    """
    faults = [
        f"train.track: {name} needs the package {PACKAGES[name]}; pip install 'rayloom[{name}]'"
        for name in job.train.track
        if find_spec(PACKAGES[name]) is None
    ]
    if "mlflow" in job.train.track and job.output_folder is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        faults.append("train.track: mlflow needs MLFLOW_TRACKING_URI where output_dir is an address")
    if faults:
        raise RequestError(*faults)


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics by name, `examples/SET` for a mapping; the position is no measure."""
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if name in ("step", "position"):
            continue
        parts = {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        numbers |= {key: float(part) for key, part in parts.items() if isinstance(part, int | float)}
    return numbers


class Trackers:
    """All of a job's trackers at once.

    Args:
        say: for a line about one that is dropped.
    """

    def __init__(self, job: JobConfig, folder: Path, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}
        makers: dict[str, Callable[[JobConfig, Path], Tracker]] = {"ray metrics": RayMetrics}
        makers |= {name: _MAKERS[name] for name in job.train.track}
        for name, make in makers.items():
            try:
                self._open[name] = make(job, folder)
            except Exception as error:  # the tracker's code and its server may raise anything
                self._drop(name, error)

    def log(self, row: Mapping[str, Any]) -> None:
        numbers = flat(row)
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(int(row["step"]), numbers)
            except Exception as error:
                self._drop(name, error)

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            try:
                tracker.close()
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        self._say(f"{name} gets no more metrics: {type(error).__name__}: {first_line(error)}")


class RayMetrics:
    """Gauges of Ray, which its nodes export to Prometheus."""

    def __init__(self, job: JobConfig, folder: Path) -> None:
        self._gauges = Gauges(job.name)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in {"step": float(step), **numbers}.items():
            measure, _, part = name.partition("/")
            self._gauges.set(measure, value, part)
        if "loss" in numbers:
            self._gauges.set("loss_is_no_number", not math.isfinite(numbers["loss"]))

    def close(self) -> None:
        """Ray ends them with the driver."""


class TensorBoard:
    """Event files in `tensorboard/` of the run directory."""

    def __init__(self, job: JobConfig, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, which reads WANDB_MODE, WANDB_PROJECT and the like from the environment. A resumed job goes on in
    its run."""

    def __init__(self, job: JobConfig, folder: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rayloom"),
            name=job.name,
            id=kept(folder / "wandb_run", lambda: new_id(job, folder)),
            resume="allow",
            dir=str(folder),
            config=job.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI, or else in `mlflow.db` beside the run directory. A resumed job goes on
    in its run."""

    def __init__(self, job: JobConfig, folder: Path) -> None:
        import mlflow

        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.parent / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(tracking_uri=place)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rayloom")
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        self._run = kept(folder / "mlflow_run", lambda: self._new_run(job, number))

    def _new_run(self, job: JobConfig, experiment: str) -> str:
        run: str = self._client.create_run(experiment, run_name=job.name).info.run_id
        for key, value in _parameters(job.model_dump(mode="json")).items():
            self._client.log_param(run, key, value)
        return run

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def new_id(job: JobConfig, folder: Path) -> str:
    """Of a run that has rows already, but no such file, the one that earlier versions gave it."""
    rows = folder / "metrics.jsonl"
    if rows.exists() and rows.stat().st_size:
        return hashlib.sha256(job.run_place.encode()).hexdigest()[:16]
    return secrets.token_hex(8)


def kept(file: Path, make: Callable[[], str]) -> str:
    """The name of the run that a job goes on in, or of a new one, which is written down."""
    if not file.exists():
        file.write_text(make() + "\n")
    return file.read_text().strip()


_MAKERS: dict[str, Callable[[JobConfig, Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def _parameters(job: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A job's keys as `train.batch_size`, with what they say."""
    found: dict[str, str] = {}
    for name, value in job.items():
        if isinstance(value, dict):
            found |= _parameters(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value)[:500]
    return found
