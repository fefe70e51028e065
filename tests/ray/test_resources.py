"""What a job finds in the cluster that something else of it holds already."""

from __future__ import annotations

import pytest
import ray

from rayloom.train.config import TrainConfig
from rayloom.train.resources import settle_workers

pytestmark = pytest.mark.usefixtures("connected")


def test_what_engines_hold_is_not_left_for_reading_data() -> None:
    """Tasks for which there is no room would never start, and the workers wait for them."""
    ray.init()
    try:
        total = ray.cluster_resources()["CPU"]
        train = TrainConfig(device="cpu")
        _, alone = settle_workers(train, wait=True)
        assert (alone.task_cpus, alone.task_concurrency) == (1.0, total - 1)
        _, beside = settle_workers(train, wait=True, beside=lambda device: [{"CPU": total - 1}])
        _, later = settle_workers(train, wait=True, held=total - 1)  # the engines are there
        assert beside == later
        assert later.task_cpus == 0.0
    finally:
        ray.shutdown()
