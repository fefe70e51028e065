"""Engines and train workers that share GPUs: Ray puts one of each on every GPU. The GPUs are there by declaration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

from rayloom.errors import JobError
from rayloom.train.policy_sync import check_shared_gpu

PROGRAM = """
import asyncio, json, sys
from functools import partial
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rayloom.config.document import Document
from rayloom.config.read import validate_job
from rayloom.rollout.members import Members
from rayloom.rollout.request import EngineOptions
from rayloom.train.engines import engine_bundles
from rayloom.train.resources import settle_workers

count, shares = int(sys.argv[1]), sys.argv[2] == "shared"
ray.init(num_gpus=count if shares else 2 * count, num_cpus=8, _temp_dir=sys.argv[3], include_dashboard=False)
job = validate_job(Document("test", {
    "name": "test", "model": {"path": "somewhere"}, "data": {"train": ["rows.jsonl"]}, "stage": {"type": "ppo"},
    "train": {"workers": count, "cpus_per_worker": 0.5, "wait_for_resources": 5},
    "rollout": {"engines": count, "cpus_per_engine": 0.5, "share_gpus": shares, "gpu_memory": 0.5},
}))

def gpus(group, share):
    @ray.remote(num_cpus=0.5, num_gpus=share)
    def of_this():
        return ray.get_gpu_ids()
    places = [PlacementGroupSchedulingStrategy(group, number) for number in range(count)]
    return ray.get([of_this.options(scheduling_strategy=place).remote() for place in places])

train, resources = settle_workers(
    job.train, wait=False, beside=partial(engine_bundles, job), gpus=job.rollout.gpus_per_worker
)
members = Members(job.rollout, EngineOptions("somewhere", "bf16", 64, device="gpu"), (1,))
asyncio.run(members._reserve())
engines = gpus(members._group, job.rollout.gpus_per_engine)
found = []
for attempt in range(2):  # the workers of a job that goes on after a fault are placed anew
    group = placement_group([resources.per_worker] * train.workers)
    assert group.wait(20), "no room for the workers"
    found.append(gpus(group, job.rollout.gpus_per_worker))
    remove_placement_group(group)
print("FOUND", json.dumps({"engines": engines, "workers": found}))
"""


def test_a_worker_beside_the_engine_of_another_job_is_told() -> None:
    engines = [("a" * 12, ("0",)), ("b" * 12, ("0",))]
    check_shared_gpu(("b" * 12, ("0",)), engines)
    check_shared_gpu(("c" * 12, ()), engines)  # on CPU
    for place in (("a" * 12, ("1",)), ("c" * 12, ("0",))):
        with pytest.raises(JobError, match=r"a worker is on GPU . of node (aaa|ccc).*the engines are on GPU 0 of"):
            check_shared_gpu(place, engines)


@pytest.mark.parametrize(
    ("count", "how"),
    [
        (2, "shared"),
        pytest.param(4, "shared", marks=pytest.mark.slow),
        pytest.param(2, "apart", marks=pytest.mark.slow),
    ],
)
def test_who_is_on_which_gpu(count: int, how: str) -> None:
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as short:  # Ray's sockets have room for short paths only
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(count), how, short],
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": ""},
            capture_output=True,
            text=True,
            timeout=180,
        )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stderr[-3000:]]
    found = json.loads(line.removeprefix("FOUND "))
    engines = [gpu for of_one in found["engines"] for gpu in of_one]
    assert len(set(engines)) == count
    for workers in found["workers"]:
        gpus = [gpu for of_one in workers for gpu in of_one]
        assert len(set(gpus)) == count
        assert (set(gpus) == set(engines)) == (how == "shared")
        assert set(gpus).isdisjoint(engines) == (how == "apart")
