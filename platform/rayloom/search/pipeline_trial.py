"""One trial of a search over a pipeline, as Ray Tune runs it: step after step, of which Tune hears the last one.

A step that another trial has finished is not run again, and one that another trial trains is waited for.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayloom.errors import JobError
from rayloom.pipeline.plan import PipelinePlan, of_step
from rayloom.pipeline.run import step_summary, write_pipeline_result
from rayloom.pipeline.wire import PlannedStep
from rayloom.search.pipeline_plan import PipelineSearchPlan
from rayloom.search.plan import TRIALS
from rayloom.search.trial import POLL_SECONDS, TrialRun
from rayloom.train.driver import run_job
from rayloom.train.host import Host
from rayloom.train.report import MetricsRow
from rayloom.train.run_dir import find_run, rest_of


class PipelineTrialRun(TrialRun):
    """Tune's side of a trial whose jobs are a pipeline's steps. The share of its training is that of its last step."""

    def _train(self) -> dict[str, Any]:
        search, started = self._task.plan, time.time()
        assert isinstance(search, PipelineSearchPlan)
        folder = search.folder / TRIALS / self.trial_name
        folder.mkdir(parents=True, exist_ok=True)
        text = search.trial_text(self.trial_name, str(folder.parent), self._point)
        (folder / "pipeline.yaml").write_text(text, encoding="utf-8")
        plan = search.trial_plan(self._point)
        plan.folder.mkdir(parents=True, exist_ok=True)
        results: list[dict[str, Any]] = []
        for step in plan.steps:
            results.append(self._run_step(step, plan, is_last=step is plan.steps[-1]))
            write_pipeline_result(folder, self.trial_name, results, started, plan.steps[-1].model)
            if results[-1]["status"] == "stopped":
                return {"status": "stopped"}
        return {"status": "finished"}

    def _run_step(self, step: PlannedStep, plan: PipelinePlan, *, is_last: bool) -> dict[str, Any]:
        with self._alone(plan.folder / f".{step.job.name}.lock") as is_alone:
            if not is_alone:
                return step_summary(step, {"status": "stopped"}, skipped=False)
            left = rest_of(step.job)
            if left is None:
                run = find_run(step.job)
                for row in run.metrics() if is_last else ():
                    self._events.put(row)
                return step_summary(step, run.result(), skipped=True)
            host = Host(self._events.put if is_last else _leave, self._stop, self._task.jobs)
            try:
                with of_step(step.name):
                    return step_summary(step, run_job(left, started=time.time(), host=host), skipped=False)
            except JobError as error:
                raise JobError(f"step {step.name}: {error}") from error

    @contextmanager
    def _alone(self, file: Path) -> Iterator[bool]:
        """While no other trial has the step; False: told to stop meanwhile. A process that dies leaves it."""
        with file.open("w") as lock:
            while not self._stop.is_set():
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._stop.wait(POLL_SECONDS)
                    continue
                yield True
                return
            yield False


def _leave(row: MetricsRow) -> None:
    """A step before the last: its metrics are in its own directory."""
