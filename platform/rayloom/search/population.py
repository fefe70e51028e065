"""Population based training (Jaderberg et al. 2017): who takes over whose checkpoint, with which values.

Trials train side by side. At each rung, so many steps after the one before, their values of the metric are compared,
and each of the worst goes on from the checkpoint that one of the best had at that very rung, with values of that one's
that are changed a little or drawn anew.

Not Ray Tune's own `PopulationBasedTraining`, which compares a trial with wherever the others happen to be, and draws
from the process's random numbers: what comes of a search there depends on the clock. Its checkpoint is one that Tune
copies while the job trains on. Here a rung is decided when every trial has come to it, from values of one and the same
step: the seed and the values of the metric tell all of it. No trial waits for that; it trains on, and one that has to
take over drops what it has trained since.

Pure functions; no Ray.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.search.config import SearchConfig
from rayloom.search.results import FAILED, Ledger
from rayloom.search.space import Entry, Point, shortened

CHANGEABLE = (
    "train.learning_rate",
    "train.weight_decay",
    "train.max_grad_norm",
    "train.warmup",
    "train.scheduler",
)
"""Keys that a resumed run may have other values of, and that count from then on."""


@dataclass(frozen=True)
class Rungs:
    """Where trials are compared: `count` times, each `every` steps after the one before."""

    every: int
    count: int


def rungs_of(job: JobConfig, search: SearchConfig) -> Rungs:
    """Where a population's trials are compared; the last rung comes before the end."""
    assert job.train.max_steps is not None  # checked before
    of_evaluation = search.metric.startswith("eval_") and job.train.eval_steps is not None
    period = job.train.eval_steps if of_evaluation else job.train.logging_steps
    assert period is not None
    every = period * max(1, round(job.train.max_steps * search.interval / period))
    return Rungs(every, (job.train.max_steps - 1) // every)


def check_population(job: JobConfig, search: SearchConfig) -> None:
    """Refuse what a population cannot do.

    Raises:
        RequestError: naming the key and what would be right.
    """
    faults = []
    for entry in search.entries:
        if entry.key not in CHANGEABLE:
            faults.append(
                f"search.space: {entry.key} cannot change within a run, and a trial of a population goes on with what "
                f"another one has trained; search over {', '.join(CHANGEABLE)}, or take another scheduler"
            )
    if job.train.max_steps is None:
        faults.append("search.scheduler: population compares trials at steps of the training; say train.max_steps")
    elif rungs_of(job, search).count < 1:
        faults.append(
            f"search.interval: {search.interval:g} of train.max_steps ({job.train.max_steps}), where {search.metric} "
            "comes, is not before the end; lower it, or how many steps lie between two values"
        )
    if job.train.best_metric is not None:
        faults.append(
            "train.best_metric: a trial of a population goes on from another one's checkpoint, and the best one before "
            "is not there; leave it out"
        )
    if faults:
        raise RequestError(*faults)


def with_rungs(job: JobConfig, search: SearchConfig) -> JobConfig:
    """A trial's job, which has a checkpoint at each rung."""
    every = rungs_of(job, search).every
    if every % job.train.save_steps == 0:
        return job
    return job.model_copy(update={"train": job.train.model_copy(update={"save_steps": every})})


@dataclass(frozen=True)
class Exploit:
    """A trial goes on from another one's checkpoint."""

    trial: str
    source: str
    point: Point
    """What it goes on with."""


def exploits(
    values: Mapping[str, float],
    points: Mapping[str, Point],
    entries: Sequence[Entry],
    search: SearchConfig,
    rung: int,
) -> list[Exploit]:
    """What becomes of a rung: a pure function of the arguments.

    Args:
        values: of the metric, of each trial, at this rung.
        points: what the trials train with.
        entries: the space.
    """
    sign = 1 if search.mode == "min" else -1
    ranked = sorted(values, key=lambda name: (sign * values[name], name))
    count = min(math.ceil(len(ranked) * search.quantile), len(ranked) // 2)
    best, worst = ranked[:count], ranked[len(ranked) - count :]
    generator = random.Random(f"{search.seed} {rung}")
    found = []
    for trial in worst:
        source = generator.choice(best)
        point = changed(points[source], entries, search, generator)
        if values[source] != values[trial]:
            found.append(Exploit(trial, source, point))
    return found


def changed(point: Point, entries: Sequence[Entry], search: SearchConfig, generator: random.Random) -> Point:
    """A point near another one; each value may also be drawn anew."""
    return {
        entry.key: (
            entry.draw(generator)
            if generator.random() < search.resample
            else _neighbour(entry, point[entry.key], search.perturb, generator.choice((-1, 1)))
        )
        for entry in entries
    }


def _neighbour(entry: Entry, value: Any, share: float, direction: int) -> Any:
    if not entry.is_range:
        place = entry.arguments.index(value) + direction
        return copy.deepcopy(entry.arguments[min(max(place, 0), len(entry.arguments) - 1)])
    low, high = entry.arguments
    moved = min(max(value * (1 + direction * share), low), high)
    return round(moved) if entry.kind == "randint" else shortened(moved)


# --- what the ledger says of it ---------------------------------------------------------------------------------------


def next_rung(ledger: Ledger, trials: int, rungs: Rungs) -> int | None:
    """The rung that is to be decided, which all trials have passed that have not failed; None: there is none."""
    rung = int(ledger.get("decided", 0)) + 1
    alive = [trial for trial in ledger["trials"] if trial["status"] != FAILED]
    arrived = [trial for trial in alive if trial["passed"] >= rung]
    failed = len(ledger["trials"]) - len(alive)
    return rung if rung <= rungs.count and arrived and len(arrived) + failed == trials else None


def taken_over(ledger: Ledger, name: str) -> list[dict[str, Any]]:
    """The exploits of a trial, the first one first."""
    return [exploit for exploit in ledger.get("exploits", []) if exploit["trial"] == name]


def told(exploit: Mapping[str, Any]) -> str:
    """An exploit in one line."""
    changes = [f"{key} {exploit['old'].get(key)} -> {value}" for key, value in exploit["new"].items()]
    return f"{exploit['trial']} takes over {exploit['from']} at step {exploit['step']}: {', '.join(changes)}"


def history(ledger: Ledger, name: str) -> list[dict[str, Any]]:
    """How the model of a trial was trained, in its order: from which step, in which trial's directory, with what."""
    current = {trial["name"]: trial["values"] for trial in ledger["trials"]}
    return _history(ledger, name, current, math.inf)


def _history(ledger: Ledger, name: str, current: Mapping[str, Any], before: float) -> list[dict[str, Any]]:
    own = taken_over(ledger, name)
    earlier = [exploit for exploit in own if exploit["rung"] < before]
    if not earlier:
        first = own[0]["old"] if own else current[name]
        return [{"step": 0, "trial": name, "values": first}]
    last = earlier[-1]
    goes_on = {"step": last["step"], "trial": name, "values": last["new"]}
    return [*_history(ledger, last["from"], current, last["rung"]), goes_on]
