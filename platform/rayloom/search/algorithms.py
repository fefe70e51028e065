"""Ray Tune's searchers and schedulers, from the job's words."""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from rayloom.search.config import SearchConfig
from rayloom.search.plan import SearchPlan
from rayloom.search.space import Entry
from rayloom.search.trial import PERCENT, POINT

# Below 100: a trial that is at its end is not to be stopped while it saves its model.
_LAST_RUNG = 99.99


def space_of(plan: SearchPlan) -> dict[str, Any]:
    """What Tune makes trials from: the points, or for a searcher a domain for each key."""
    if plan.points is not None:
        return {POINT: tune.grid_search(list(plan.points))}
    return {entry.key: _domain(entry) for entry in plan.entries}


def searcher_of(search: SearchConfig) -> Any:
    """Who proposes values; None: Tune takes the points in their order."""
    if search.searcher == "optuna":
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return OptunaSearch(metric=search.metric, mode=search.mode, seed=search.seed)
    if search.searcher == "hyperopt":
        from ray.tune.search.hyperopt import HyperOptSearch

        return HyperOptSearch(metric=search.metric, mode=search.mode, random_state_seed=search.seed)
    return None


def scheduler_of(search: SearchConfig) -> Any:
    """Who stops trials; the time is the share of a trial's training, in percent."""
    if search.scheduler == "asha":
        return ASHAScheduler(
            time_attr=PERCENT,
            max_t=_LAST_RUNG,  # type: ignore[arg-type]  # declared whole, and not taken for it
            grace_period=100 * search.grace,  # type: ignore[arg-type]
            reduction_factor=search.reduction,
            stop_last_trials=False,
        )
    if search.scheduler == "median":
        return MedianStoppingRule(
            time_attr=PERCENT,
            grace_period=100 * search.grace,
            min_samples_required=2,
            min_time_slice=float("inf"),  # type: ignore[arg-type]  # never pauses a trial to let others catch up
        )
    return FIFOScheduler()


def _domain(entry: Entry) -> Any:
    """Values by their number: searchers do not take mappings for values."""
    if entry.kind == "choice":
        return tune.choice(list(range(len(entry.arguments))))
    low, high = entry.arguments
    if entry.kind == "randint":
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if entry.kind == "loguniform" else tune.uniform(low, high)
