"""What Tune tells of the trials: written to `search.json` as it comes, and said on the terminal."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune

from rayloom.errors import first_line
from rayloom.search.gauges import show_search
from rayloom.search.member import NUMBER, RUNG
from rayloom.search.plan import TRIALS, SearchPlan
from rayloom.search.population import next_rung, rungs_of, taken_over, told
from rayloom.search.results import FAILED, FINISHED, STOPPED, Ledger, read_ledger, write_ledger
from rayloom.search.takeover import decide, forget_pins
from rayloom.search.trial import ENDED, PAUSED, PERCENT, REFUSED, point_of
from rayloom.search.turns import give_for
from rayloom.train.gauges import Gauges

_WRITE_SECONDS = 5.0
_END_SECONDS = 600.0


class StopWhenRefused(tune.Stopper):
    """Ends the search when a trial says that it makes no sense."""

    def __init__(self) -> None:
        self._refused = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether this trial is to stop."""
        self._refused |= REFUSED in result
        return self._refused

    def stop_all(self) -> bool:
        """Whether all are."""
        return self._refused


class LedgerWriter(tune.Callback):
    """Hears from Tune, in the search's own process. Ray pickles it with the search, so all it keeps is in the file."""

    def __init__(self, plan: SearchPlan) -> None:
        self._plan = plan
        self._ledger: dict[str, Any] = {}
        self._written = 0.0
        self._paused: set[str] = set()
        self._gauges: Gauges | None = None

    def setup(self, *args: Any, **info: Any) -> None:
        """Begin, or go on with what a search that was killed had written."""
        plan = self._plan
        search = plan.search
        head: Ledger = {"name": plan.job.name, "metric": search.metric, "mode": search.mode, "best": None}
        if self._is_population:
            head |= {"decided": 0, "exploits": []}
        self._ledger = head | read_ledger(plan.folder)
        self._gauges = Gauges(plan.job.name)
        if self._is_population:
            forget_pins(plan.folder, self._ledger["decided"])
            self._decide()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins, or goes on."""
        record = self._record(trial)
        point = point_of(self._plan, trial.config)
        if self._is_population:  # of which Tune does not know what has changed
            point = record.get("point", point)
        values = self._plan.values(point)
        record |= {"status": "running", "values": values, "point": point, "begun": time.time()}
        record |= {"run_dir": str(self._plan.folder / TRIALS / record["name"]), "error": None}
        self._say(f"{record['name']} starts: {', '.join(f'{key} {value}' for key, value in values.items())}")
        self._write()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **i: Any) -> None:
        """A value of the metric has come."""
        metric = self._plan.search.metric
        if PAUSED in result:
            self._paused.add(str(trial))
            if self._paused >= {str(one) for one in trials if one.status == "RUNNING"}:
                signal.raise_signal(signal.SIGUSR1)  # how Tune is told to leave its trials for another time
        elif RUNG in result:
            self._arrive(trial, result)
        elif REFUSED in result:
            self._ledger[REFUSED] = result[REFUSED]
            self._write()
        elif ENDED not in result and metric in result:
            record = self._record(trial)
            record |= {"value": result[metric], "step": result["step"], "progress": result[PERCENT] / 100}
            self._say(
                f"{record['name']}  step {result['step']}  {result[PERCENT]:.0f} %  {metric} {result[metric]:.4f}"
            )
            if time.monotonic() > self._written + _WRITE_SECONDS:
                self._write()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has come to its end, or was stopped. Then its job ends first: when the search is over, Tune gives its
        processes five seconds."""
        if actor := trial.temporary_state.ray_actor:
            ray.get(actor.end_job.remote(), timeout=_END_SECONDS)
        self._end(trial, FINISHED if ENDED in trial.last_result else STOPPED)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed; the search goes on."""
        self._end(trial, FAILED, _reason(trial))

    def _end(self, trial: Any, status: str, error: str | None = None) -> None:
        if REFUSED in self._ledger:
            return
        record = self._record(trial)
        now = time.time()
        if self._is_population:
            give_for(self._plan.folder, record["name"])  # it may have died with it
        record |= {"status": status, "error": error, "ended": now, "seconds": round(now - record["begun"], 2)}
        self._say(f"{record['name']} {status}" + (f": {error}" if error else f" at step {record['step']}"))
        self._write()
        if self._is_population:
            self._decide()

    @property
    def _is_population(self) -> bool:
        return self._plan.search.scheduler == "population"

    def _arrive(self, trial: Any, result: dict[str, Any]) -> None:
        """A trial of a population has come to a rung, in what it trains now or in what it drops."""
        record, rung, metric = self._record(trial), result[RUNG], self._plan.search.metric
        if result[NUMBER] != len(taken_over(self._ledger, record["name"])) or rung <= record["passed"]:
            return
        record["passed"] = rung
        if metric in result:
            record["rungs"][str(rung)] = {"step": result["step"], "value": result[metric]}
        self._write()
        self._decide()

    def _decide(self) -> None:
        """Decide what can be decided: who goes on from whose checkpoint."""
        plan, before = self._plan, len(self._ledger["exploits"])
        while rung := next_rung(self._ledger, plan.trials, rungs_of(plan.job, plan.search)):
            decide(plan, self._ledger, rung)
            self._write()
            forget_pins(plan.folder, rung)
        for exploit in self._ledger["exploits"][before:]:
            self._say(told(exploit))

    def _record(self, trial: Any) -> dict[str, Any]:
        found: dict[str, Any] | None
        if found := next((record for record in self._ledger["trials"] if record["name"] == str(trial)), None):
            return found
        record: dict[str, Any] = {"name": str(trial), "status": "running", "value": None, "step": 0, "progress": 0.0}
        if self._is_population:
            record |= {"passed": 0, "rungs": {}}
        self._ledger["trials"].append(record)
        return record

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _write(self) -> None:
        write_ledger(self._plan.folder, self._ledger)
        self._written = time.monotonic()
        if self._gauges is not None:
            show_search(self._gauges, self._ledger, self._plan.trials)


def _reason(trial: Any) -> str:
    """Why a trial failed. Tune writes it to a file at once, and to where `get_pickled_error` looks only later."""
    file = trial.pickled_error_file
    if file is None:
        return f"Ray Tune could not end it: {(trial.error_file and Path(trial.error_file).read_text()) or ''}".strip()
    error = cloudpickle.loads(Path(file).read_bytes())
    return first_line(getattr(error, "cause", None) or error)
