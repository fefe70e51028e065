"""One trial of a population, as Ray Tune runs it.

    its turn -> takes over, if that was decided -> the job -> a rung: another's turn? -> ... -> the last rung is decided

At each rung the job's checkpoint is pinned, and the search hears of it (`rayloom.search.ledger`). What was decided the
trial finds in `search.json`, which it looks at every second. Then it ends its job and begins again in the directory
that was made for it.
"""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

from rayloom.errors import JobError
from rayloom.search.metric import Metric
from rayloom.search.plan import TRIALS
from rayloom.search.population import Rungs, rungs_of, taken_over
from rayloom.search.results import Ledger, read_ledger
from rayloom.search.takeover import is_ordered, pins_folder, take_over
from rayloom.search.trial import PERCENT, POLL_SECONDS, TrialRun, TrialTask, what_is_left
from rayloom.train.driver import run_job
from rayloom.train.host import Host
from rayloom.train.monitor import answer
from rayloom.train.pins import METRICS, Pins, complete, pinned_step
from rayloom.train.run_dir import find_run, read_rows

RUNG, NUMBER = "rung", "number"
"""In a result: the rung that the trial has come to, with its value there, if it has a checkpoint of it; how often the
trial had taken over."""


class MemberRun(TrialRun):
    """Tune's side of a trial whose job ends and begins again."""

    def setup(self, config: dict[str, Any], task: TrialTask) -> None:  # type: ignore[override]  # by `with_parameters`
        """Wait for the trial's turn, and start the job."""
        self._halt = threading.Event()  # the job that runs now ends, maybe to begin again
        self._number = 0  # of times that it has taken over
        self._run_dir = task.plan.folder / TRIALS / self.trial_name
        super().setup(config, task)

    @property
    def _rungs(self) -> Rungs:
        return rungs_of(self._task.plan.job, self._task.plan.search)

    @property
    def _ledger(self) -> Ledger:
        return read_ledger(self._task.plan.folder)

    # --- in the thread: the job, again and again -------------------------------------------------------------------

    def _train(self) -> dict[str, Any]:
        turns, stopped = self._task.turns, {"status": "stopped"}
        while self._wait(self._is_its_turn):
            try:
                result = self._train_on()
            finally:
                answer(turns.give.remote(self.trial_name), self.trial_name)
            if result["status"] == "finished":
                self._events.put({RUNG: {RUNG: self._rungs.count, NUMBER: self._number}})  # of which it may have no pin
                if not self._wait(self._is_settled):
                    return stopped
                if not is_ordered(self._run_dir, self._ledger):
                    return result
            elif self._stop.is_set():
                return result
        return stopped

    def _wait(self, until: Any) -> bool:
        """Whether it has come before the trial was told to stop."""
        while not self._stop.is_set():
            if until():
                return True
            self._stop.wait(POLL_SECONDS)
        return False

    def _is_its_turn(self) -> bool:
        rung = self._record(self._ledger).get("passed", 0)
        return bool(answer(self._task.turns.ask.remote(self.trial_name, rung), self.trial_name))

    def _is_settled(self) -> bool:
        """Of a trial at its end: whether it is known that it stays as it is, or that it has to take over."""
        ledger = self._ledger
        return bool(ledger.get("decided", 0) >= self._rungs.count or is_ordered(self._run_dir, ledger))

    def _train_on(self) -> dict[str, Any]:
        """Run what is left of the job, in the directory that it has to go on in."""
        plan, ledger, rungs = self._task.plan, self._ledger, self._rungs
        take_over(self._run_dir, ledger)
        self._number = number = len(taken_over(ledger, self.trial_name))
        pins = pins_folder(plan.folder, self.trial_name, number)
        for folder in pins.parent.glob("*"):
            if folder != pins:  # of what the trial has dropped
                shutil.rmtree(folder, ignore_errors=True)
        self._halt = threading.Event()
        if self._stop.is_set():
            self._halt.set()
        job = plan.trial_job(self.trial_name, self._record(ledger).get("point", self._point))

        def tell(pin: Path) -> None:
            self._tell(pin, number)

        left = what_is_left(job)
        if left is None:  # it had come to its end before
            for row in find_run(job).metrics():
                self._events.put(row)
        whole = (pin for pin in pins.glob("*") if pin.name.isdecimal())
        for pin in sorted(whole, key=lambda pin: int(pin.name)):
            tell(pin)  # the search may have been killed before it heard of it
        if left is None:
            return {"status": "finished"}
        host = Host(self._events.put, self._halt, self._task.jobs, Pins(pins, rungs.every, rungs.count), tell)
        return run_job(left, started=time.time(), host=host)

    def _record(self, ledger: Ledger) -> dict[str, Any]:
        """What the ledger says of this trial."""
        return next((trial for trial in ledger["trials"] if trial["name"] == self.trial_name), {})

    def _tell(self, pin: Path, number: int) -> None:
        """A checkpoint is pinned: the trial has come to a rung. Where others are behind, it lets them train."""
        if int(pin.name) <= self._record(self._ledger).get("passed", 0):
            return  # an attempt before this one has told it, and the pin may be deleted at any time
        complete(pin, self._run_dir)
        metric = Metric(self._metric.name)
        row: dict[str, Any] | None = None
        for seen in read_rows(pin / METRICS):
            if (value := metric.read(seen)) is not None:
                row = {metric.name: value, "step": seen["step"], PERCENT: 100 * seen["progress"]}
        if row is None:
            raise JobError(f"search.metric: no {metric.name} came up to step {pinned_step(pin)}")
        self._events.put({RUNG: {**row, RUNG: int(pin.name), NUMBER: number}})
        if answer(self._task.turns.is_wanted.remote(int(pin.name)), self.trial_name):
            self._halt.set()

    # --- in Tune's thread -------------------------------------------------------------------------------------------

    def _result(self, event: dict[str, Any]) -> dict[str, Any] | None:
        rung: dict[str, Any] | None = event.get(RUNG)
        return rung or super()._result(event)

    def _ask_to_stop(self) -> None:
        super()._ask_to_stop()
        self._halt.set()

    def _watch(self) -> None:
        super()._watch()
        if is_ordered(self._run_dir, self._ledger):
            self._halt.set()
