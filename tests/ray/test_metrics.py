"""The gauges that Prometheus reads from Ray's nodes."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray

from rayloom.config.job import JobConfig
from rayloom.jobs.local_head import LocalHead
from rayloom.train.gauges import HELP
from rayloom.train.track import RayMetrics, flat

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected")]


def test_the_numbers_of_a_row(head: LocalHead, tmp_path: Path) -> None:
    job = JobConfig.model_validate({"name": "watched", "model": {"path": "m"}, "data": {"train": ["x.jsonl"]}})
    wanted = {"ray_rayloom_loss{", 'job="watched"', 'of="chosen"', "ray_rayloom_tokens_per_second", "123.25"}
    wanted |= {f"# HELP ray_rayloom_loss {HELP['loss']}", "ray_rayloom_loss_is_no_number{"}
    with ray.init(address=head.cluster_address, namespace="test", logging_level="ERROR", log_to_driver=False):
        metrics = RayMetrics(job, tmp_path)
        port = next(node["MetricsExportPort"] for node in ray.nodes() if node["Alive"])
        deadline = time.monotonic() + 60
        while True:
            row = {"step": 7, "loss": 0.5, "tokens_per_second": 123.25, "rewards/chosen": 0.25}
            metrics.log(7, flat(row))
            page = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
            missing = {text for text in wanted if text not in page}
            if not missing:
                break
            assert time.monotonic() < deadline, f"not told within a minute: {missing}"
            time.sleep(1)
    (line,) = [line for line in page.splitlines() if line.startswith("ray_rayloom_step{") and "watched" in line]
    assert line.endswith((" 7.0", " 7"))
