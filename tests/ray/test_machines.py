"""Machines that die or are taken away: the job goes on with the workers that fit, on the same rows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._raylet import GcsClient
from tests.ray.small_jobs import job, metrics, run, write_rows
from tests.ray.test_recovery import at_step

from rayloom.config.job import JobConfig
from rayloom.jobs.local_head import LocalHead

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected"), pytest.mark.timeout(400)]

STEPS = 200  # of a twentieth of a second


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [{"path": str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 200))}]


class Machine:
    """A second node of the head's cluster, with four CPUs."""

    def __init__(self, head: LocalHead) -> None:
        self._head = head
        options = {"address": head.cluster_address, "num-cpus": 4, "min-worker-port": 0, "max-worker-port": 0}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
            + [f"--{name}={value}" for name, value in options.items()],
            env={**os.environ, **head.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def raylet(self) -> psutil.Process:
        children = psutil.Process(self._process.pid).children(recursive=True)
        return next(child for child in children if child.name().startswith("raylet"))

    def die(self) -> None:
        os.kill(self.raylet().pid, signal.SIGKILL)

    def node_id(self) -> str:
        nodes = [node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" not in node["Resources"]]
        return str(nodes[0]["NodeID"])

    def end(self) -> None:
        children = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        for process in [*children, self._process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()


@pytest.fixture
def machine(head: LocalHead) -> Iterator[Machine]:
    second = Machine(head)
    try:
        wait_for_nodes(head, 2)
        yield second
    finally:
        second.end()
        wait_for_nodes(head, 1)


def wait_for_nodes(head: LocalHead, count: int) -> None:
    deadline = time.monotonic() + 90
    with ray.init(address=head.cluster_address, namespace="test", logging_level="ERROR", log_to_driver=False):
        while sum(node["Alive"] for node in ray.nodes()) != count:
            assert time.monotonic() < deadline, f"the cluster never had {count} nodes"
            time.sleep(0.5)


def spread_job(model: Path, output: Path, sets: list[dict[str, Any]], name: str, **train: Any) -> JobConfig:
    part = {"max_steps": STEPS, "save_steps": 25, "learning_rate": 1e-3, "cpus_per_worker": 3}
    part |= {"batch_size": 8, "global_batch_size": 48}
    return job(model, output, sets, name=name, train=part | train)


def losses(config: JobConfig) -> list[float]:
    rows = [row for row in metrics(config) if "loss" in row]
    assert config.train.max_steps is not None
    assert [row["step"] for row in rows] == list(range(1, config.train.max_steps + 1))
    return [row["loss"] for row in rows]


def test_a_machine_is_taken_away(
    head: LocalHead, machine: Machine, tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Two workers on two machines; one machine says that it will go. One worker goes on, and no step is made again."""
    alone = spread_job(tiny_model, tmp_path, sets, "alone")
    run(alone)

    def drain() -> None:
        preemption, deadline = 2, int(1000 * (time.time() + 300))  # DRAIN_NODE_REASON_PREEMPTION
        GcsClient(head.cluster_address).drain_node(machine.node_id(), preemption, "spot", deadline)

    leaving = spread_job(tiny_model, tmp_path, sets, "leaving", workers=2, min_workers=1, max_failures=0)
    with at_step(leaving, 5, drain):
        result, _ = run(leaving)
    (event,) = result["breaks"]
    assert event["kind"] == "moved"
    assert event["what"] == "1 node(s) will be taken away"
    assert 5 < event["from_step"] < STEPS
    assert event["seconds"] > 0
    assert losses(leaving) == pytest.approx(losses(alone), abs=1e-4)


def test_a_machine_dies(machine: Machine, tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = spread_job(tiny_model, tmp_path, sets, "alone")
    run(alone)
    killed = spread_job(tiny_model, tmp_path, sets, "killed", workers=2, min_workers=1)
    with at_step(killed, 120, machine.die):
        result, _ = run(killed)
    (event,) = result["breaks"]
    assert event["kind"] == "fault"
    assert event["seconds"] > 0
    assert losses(killed) == pytest.approx(losses(alone), abs=1e-4)


@pytest.mark.parametrize("engine", ["none", "zero2"])
def test_a_machine_is_added(
    engine: str,
    head: LocalHead,
    tiny_model: Path,
    sets: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A job for two workers begins with the one for which there is room, and goes on with two when a machine comes."""
    monkeypatch.setattr("rayloom.train.execution._GROW_SECONDS", 5.0)
    long = {"max_steps": 4 * STEPS, "save_steps": 4 * STEPS}
    alone = spread_job(tiny_model, tmp_path, sets, "alone", **long)
    run(alone)
    growing = spread_job(tiny_model, tmp_path, sets, "growing", workers=2, min_workers=1, deepspeed=engine, **long)
    added: list[Machine] = []
    try:
        with at_step(growing, 5, lambda: added.append(Machine(head))):
            result, _ = run(growing)
    finally:
        for machine in added:
            machine.end()
        wait_for_nodes(head, 1)
    (event,) = result["breaks"]
    assert (event["kind"], event["what"]) == ("moved", "there is room for 2 workers")
    assert 5 < event["from_step"] < 4 * STEPS
    assert losses(growing) == pytest.approx(losses(alone), abs=1e-4)
