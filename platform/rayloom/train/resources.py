"""Has the cluster what the job asks for? Answered before anything starts, within a time limit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, remove_placement_group

from rayloom.errors import RequestError
from rayloom.train.config import TrainConfig

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


def plan_resources(train: TrainConfig) -> Resources:
    """Choose the device and what is left for reading data.

    Raises:
        RequestError: GPUs are asked for and there are none.
    """
    total = ray.cluster_resources()
    if train.device == "gpu" and not total.get("GPU"):
        raise RequestError(f"train.device: gpu: the cluster has no GPU; it has {describe(total)}. Use cpu or auto")
    device = "gpu" if train.device != "cpu" and total.get("GPU") else "cpu"
    per_worker = {"CPU": train.cpus_per_worker} | ({"GPU": 1.0} if device == "gpu" else {})
    cores = max((node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]), default=1.0)
    neighbours = max(1, min(train.workers, int(cores // train.cpus_per_worker)))
    threads = max(1, int(cores) // neighbours)
    spare = total.get("CPU", 0.0) - train.workers * train.cpus_per_worker
    if spare >= 1:
        return Resources(device, per_worker, 1.0, int(spare), threads)
    return Resources(device, per_worker, 0.0, 1, threads)


def require_resources(train: TrainConfig, resources: Resources, *, wait: bool) -> None:
    """Wait until the workers' placement group can be made, at most `train.wait_for_resources` seconds.

    Args:
        wait: whether the cluster may grow; else what it has not got at all is refused at once.

    Raises:
        RequestError: saying what was asked for, what there is and what is free.
    """
    bundles = [resources.per_worker] * train.workers
    if not wait and not _fits(bundles[0], train.workers):
        raise RequestError(_shortage(train, resources, "the cluster has not got that"))
    group = placement_group(bundles, strategy="PACK")
    try:
        if not group.wait(train.wait_for_resources):
            waited = f"not free after {train.wait_for_resources:g} s (train.wait_for_resources)"
            raise RequestError(_shortage(train, resources, waited))
    finally:
        remove_placement_group(group)


def settle_workers(train: TrainConfig, *, wait: bool) -> tuple[TrainConfig, Resources]:
    """With how many workers to train now, and on what: the most that the cluster has room for, if it were free.

    Args:
        train: as the job file has it, with the most and the fewest workers.
        wait: whether the cluster may grow; else what it has not got at all is refused at once.

    Raises:
        RequestError: not even the fewest workers find room within `train.wait_for_resources` seconds.
    """
    bundle = plan_resources(train).per_worker
    workers = next((n for n in train.possible_workers if _fits(bundle, n)), train.possible_workers[-1])
    settled = train.with_workers(workers)
    resources = plan_resources(settled)
    require_resources(settled, resources, wait=wait)
    return settled, resources


def room_for_more(train: TrainConfig, workers: int, resources: Resources) -> int:
    """The largest number of workers for which, besides the present ones, there is free room; 0: there is none."""
    for number in train.possible_workers:
        if number > workers and _fits(resources.per_worker, number):
            group = placement_group([resources.per_worker] * (number - workers), strategy="PACK")
            try:
                if group.wait(_PROBE_SECONDS):
                    return number
            finally:
                remove_placement_group(group)
    return 0


def describe(amounts: dict[str, float]) -> str:
    """`2 CPU, 1 GPU` for a mapping of resources; memory and node labels are left out."""
    return ", ".join(f"{amounts.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _shortage(train: TrainConfig, resources: Resources, reason: str) -> str:
    nodes = Counter(describe(node["Resources"]) for node in ray.nodes() if node["Alive"])
    listed = "; ".join(f"{count} node{'s' * (count > 1)} with {text}" for text, count in nodes.items())
    return (
        f"train.workers: the job asks for {train.workers} workers with {describe(resources.per_worker)} each; "
        f"{reason}. "
        f"The cluster is {listed}; free now: {describe(ray.available_resources())}. "
        "Ask for fewer workers, or set train.cpus_per_worker lower"
    )


def _fits(bundle: dict[str, float], count: int) -> bool:
    places = 0
    for node in ray.nodes():
        if node["Alive"]:
            places += int(min(node["Resources"].get(name, 0.0) / amount for name, amount in bundle.items()))
    return places >= count
