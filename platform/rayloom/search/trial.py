"""One trial, as Ray Tune runs it: a whole job, in a run directory of its own, whose rows of metrics Tune hears of.

    Tune -> TrialRun.step: the next row <- queue <- a thread with `run_job` <- the job's workers

The job does not wait for Tune. A trial that is stopped saves a checkpoint and ends its workers before its process ends,
so its run directory is that of any stopped job.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from rayloom.config.job import JobConfig
from rayloom.config.read import read_job
from rayloom.errors import RequestError
from rayloom.search.metric import Metric
from rayloom.search.plan import SearchPlan
from rayloom.search.space import Point
from rayloom.train.driver import run_job
from rayloom.train.host import Host
from rayloom.train.monitor import answer
from rayloom.train.ray_session import set_variables
from rayloom.train.run_dir import find_run, rest_of

POINT = "point"
"""Where a trial's Tune config has its point, if it was drawn beforehand."""
PERCENT = "percent"
"""In a result: how much of the trial's training is done. What schedulers take for the time."""
ENDED, REFUSED, PAUSED = "ended", "refused", "paused"
"""In a result: the job has come to its end; the search makes no sense, and why; the job was told to stop."""
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class TrialTask:
    """What every trial is given besides its point."""

    plan: SearchPlan
    jobs: int
    """How many trials share the cluster."""
    folder: str
    """The search's current directory, from which paths in the job file are taken."""
    monitor: Any
    """Says when the search is told to stop."""
    turns: Any = None
    """Of a population: says which trials may train."""


class TrialRun(tune.Trainable):
    """Tune's side of a trial. Its steps are the rows that have the metric."""

    def setup(self, config: dict[str, Any], task: TrialTask) -> None:  # type: ignore[override]  # by `with_parameters`
        """Start the job."""
        set_variables()
        if Path(task.folder).is_dir():
            os.chdir(task.folder)
        self._task = task
        self._metric = Metric(task.plan.search.metric)
        self._events: queue.Queue[Any] = queue.Queue()
        self._stop = threading.Event()
        self._asked = 0.0
        self._last: dict[str, Any] = {}
        self._point = point_of(task.plan, config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """The next row that has the metric, or the end.

        Raises:
            RequestError: the trial's values make no job that can run.
            JobError: the job failed.
        """
        while True:
            event = self._next()
            if isinstance(event, Exception):
                raise event
            if (result := self._result(event)) is not None:
                return result

    def _result(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """What Tune hears of a row, or of the job's own result; None: nothing."""
        if "status" in event:  # the job's result
            if event["status"] == "stopped":
                return {**self._last, PAUSED: True}
            if not self._last:
                return {"done": True, REFUSED: str(self._metric.missing())}
            return {**self._last, "done": True, ENDED: True}
        try:
            value = self._metric.read(event)
        except RequestError as error:
            return {"done": True, REFUSED: str(error)}
        if value is None:
            return None
        self._last = {self._metric.name: value, "step": event["step"], PERCENT: 100 * event["progress"]}
        return dict(self._last)  # Tune writes into it

    def end_job(self) -> None:
        """End the job with a checkpoint, if it has not ended; return when its workers have."""
        self._ask_to_stop()
        self._thread.join()

    def cleanup(self) -> None:
        """Before the process ends."""
        self.end_job()

    def _next(self) -> Any:
        """The job's next event. Meanwhile, and however fast they come: whether the search was told to stop."""
        while True:
            if time.monotonic() > self._asked + POLL_SECONDS:
                self._asked = time.monotonic()
                self._watch()
            with suppress(queue.Empty):
                return self._events.get(timeout=POLL_SECONDS)

    def _watch(self) -> None:
        """Once a second, or a little more."""
        if answer(self._task.monitor.stop_requested.remote(), self.trial_name):
            self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        """In a thread: the job, whose rows, result or error go into the queue."""
        try:
            self._events.put(self._train())
        except Exception as error:
            self._events.put(error)

    def _train(self) -> dict[str, Any]:
        """Run what is left of the job; its result."""
        job = self._task.plan.trial_job(self.trial_name, self._point)
        left = what_is_left(job)
        if left is None:  # it had finished when the search was killed, and Tune had not noted it yet
            for row in find_run(job).metrics():
                self._events.put(row)
            return {"status": "finished"}
        return run_job(left, started=time.time(), host=Host(self._events.put, self._stop, self._task.jobs))


def point_of(plan: SearchPlan, config: dict[str, Any]) -> Point:
    """The point in a trial's Tune config: drawn beforehand, or proposed by a searcher."""
    if POINT in config:
        return dict(config[POINT])
    return {entry.key: entry.value_of(config[entry.key]) for entry in plan.entries}


def what_is_left(job: JobConfig) -> JobConfig | None:
    """What an attempt before this one has left to do of a trial; None: nothing. A run directory that is of another
    trial, which was named alike, is overwritten."""
    run = find_run(job)
    if not run.existed:
        return job
    try:
        is_own = read_job(run.path / "job.yaml") == job
    except RequestError:
        is_own = False
    return rest_of(job) if is_own else job.model_copy(update={"overwrite": True})
