"""Has the cluster what the job asks for? Answered before anything starts, within a time limit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, remove_placement_group

from rayloom.errors import RequestError
from rayloom.train.config import TrainConfig

_TRY_SECONDS = 5.0
_PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class Resources:
    """What the job takes from the cluster."""

    device: str
    """"cpu" or "gpu"."""
    per_worker: dict[str, float]
    task_cpus: float
    """CPUs that each data task reserves; 0 where the workers hold all there are."""
    task_concurrency: int
    threads: int
    """Threads that a worker on CPU computes with: its share of the cores of the largest node."""


def plan_resources(train: TrainConfig, taken: float = 0.0, jobs: int = 1, gpus: float = 1.0) -> Resources:
    """Choose the device and what is left for reading data.

    Args:
        gpus: of each worker, where the device is a GPU: less than 1 where something else has the rest of it.
        taken: CPUs that something else of the job holds.
        jobs: how many jobs like this one share the cluster, each with its part.

    Raises:
        RequestError: GPUs are asked for and there are none.
    """
    total = ray.cluster_resources()
    if train.device == "gpu" and not total.get("GPU"):
        raise RequestError(f"train.device: gpu: the cluster has no GPU; it has {describe(total)}. Use cpu or auto")
    device = "gpu" if train.device != "cpu" and total.get("GPU") else "cpu"
    per_worker = {"CPU": train.cpus_per_worker} | ({"GPU": gpus} if device == "gpu" else {})
    cores = max((node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]), default=1.0)
    neighbours = max(1, min(train.workers * jobs, int(cores // train.cpus_per_worker)))
    threads = max(1, int(cores) // neighbours)
    spare = total.get("CPU", 0.0) / jobs - train.workers * train.cpus_per_worker - taken
    if spare >= 1:
        return Resources(device, per_worker, 1.0, int(spare), threads)
    return Resources(device, per_worker, 0.0, 1, threads)


Bundles = list[dict[str, float]]


def settle_workers(
    train: TrainConfig,
    *,
    wait: bool,
    beside: Callable[[str], Bundles] = lambda device: [],
    jobs: int = 1,
    held: float = 0.0,
    gpus: float = 1.0,
) -> tuple[TrainConfig, Resources]:
    """With how many workers to train now, and on what: the most whose placement group can be made, asked for again and
    again for at most `train.wait_for_resources` seconds. A machine that died is counted among the living for a while.

    Args:
        train: as the job file has it, with the most and the fewest workers.
        wait: whether the cluster may grow; else what it has not got at all is refused at once.
        beside: what else must find room, by the device ("cpu" or "gpu").
        jobs: how many jobs like this one share the cluster.
        held: CPUs that something else of the job holds already.
        gpus: as of `plan_resources`.

    Raises:
        RequestError: saying what was asked for, what there is and what is free.
    """
    plan = plan_resources(train, jobs=jobs, gpus=gpus)
    bundle, others = plan.per_worker, beside(plan.device)
    fewest = train.with_workers(train.possible_workers[-1])
    if not wait:
        jobs_that_fit(train, beside, gpus)
    deadline = time.monotonic() + train.wait_for_resources
    while True:
        for workers in [n for n in train.possible_workers if _fits(bundle, n)] or [fewest.workers]:
            left = max(0.0, deadline - time.monotonic())
            if _can_place(  # engines first, as they start first: on a shared GPU a worker has what they leave
                others + [bundle] * workers, left if fewest.workers == train.workers else min(_TRY_SECONDS, left)
            ):
                settled = train.with_workers(workers)
                return settled, plan_resources(settled, held + sum(other["CPU"] for other in others), jobs, gpus)
        if time.monotonic() >= deadline:
            waited = f"not free after {train.wait_for_resources:g} s (train.wait_for_resources)"
            raise RequestError(_shortage(fewest, bundle, others, waited))


def jobs_that_fit(train: TrainConfig, beside: Callable[[str], Bundles] = lambda device: [], gpus: float = 1.0) -> int:
    """How many jobs like this one the cluster holds at a time, each with the fewest workers that it may have.

    Raises:
        RequestError: not one.
    """
    fewest = train.with_workers(train.possible_workers[-1])
    plan = plan_resources(fewest, gpus=gpus)
    bundle, others = plan.per_worker, beside(plan.device)
    jobs = 0
    while _fits(bundle, fewest.workers * (jobs + 1)) and _hold(([bundle] * fewest.workers + others) * (jobs + 1)):
        jobs += 1
    if not jobs:
        raise RequestError(_shortage(fewest, bundle, others, "the cluster has not got that"))
    return jobs


def room_for_more(train: TrainConfig, workers: int, resources: Resources) -> int:
    """The largest number of workers for which, besides the present ones, there is free room; 0: there is none."""
    for number in train.possible_workers:
        is_more = number > workers and _fits(resources.per_worker, number)
        if is_more and _can_place([resources.per_worker] * (number - workers), _PROBE_SECONDS):
            return number
    return 0


def _can_place(bundles: list[dict[str, float]], seconds: float) -> bool:
    """Whether there is free room for all of them at once, within some seconds."""
    group = placement_group(bundles, strategy="PACK")
    try:
        return bool(group.wait(seconds))
    finally:
        remove_placement_group(group)


def describe(amounts: dict[str, float]) -> str:
    """`2 CPU, 1 GPU` for a mapping of resources; memory and node labels are left out."""
    return ", ".join(f"{amounts.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _shortage(train: TrainConfig, bundle: dict[str, float], others: Bundles, reason: str) -> str:
    nodes = Counter(describe(node["Resources"]) for node in ray.nodes() if node["Alive"])
    engines = f", and for {len(others)} engines with {describe(others[0])} each (rollout.engines)" if others else ""
    lower = "train.cpus_per_worker" + " or rollout.cpus_per_engine" * bool(others)
    listed = "; ".join(f"{count} node{'s' * (count > 1)} with {text}" for text, count in nodes.items())
    return (
        f"train.workers: the job asks for {train.workers} workers with {describe(bundle)} each{engines}; "
        f"{reason}. "
        f"The cluster is {listed}; free now: {describe(ray.available_resources())}. "
        f"Ask for fewer workers{' or engines' * bool(others)}, or set {lower} lower"
    )


def _hold(bundles: Bundles) -> bool:
    """Whether all nodes together have what the bundles need."""
    total = ray.cluster_resources()
    return all(sum(bundle.get(name, 0.0) for bundle in bundles) <= total.get(name, 0.0) for name in ("CPU", "GPU"))


def _fits(bundle: dict[str, float], count: int) -> bool:
    places = 0
    for node in ray.nodes():
        if node["Alive"]:
            places += int(min(node["Resources"].get(name, 0.0) / amount for name, amount in bundle.items()))
    return places >= count
