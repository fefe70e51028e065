"""Machines that die or are taken away: the job goes on with the workers that fit, on the same rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._raylet import GcsClient
from tests.ray.machines import Machine, wait_for_nodes
from tests.ray.small_jobs import job, metrics, run, write_rows
from tests.ray.test_recovery import at_step, processes

from rayloom.config.job import JobConfig
from rayloom.jobs.local_head import LocalHead
from rayloom.train.execution import Execution

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected"), pytest.mark.timeout(600)]

STEPS, KILL_AT = 30, 17  # of a third of a second, on two cores; a checkpoint is made every five
MOVE_AT = 7  # and no checkpoint is made there but for the move


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [{"path": str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 200))}]


@pytest.fixture
def machine(head: LocalHead) -> Iterator[Machine]:
    second = Machine.beside(head)
    try:
        wait_for_nodes(head, 2)
        yield second
    finally:
        second.end()
        wait_for_nodes(head, 1)


def spread_job(model: Path, output: Path, sets: list[dict[str, Any]], name: str, **train: Any) -> JobConfig:
    part = {"max_steps": STEPS, "save_steps": 5, "learning_rate": 1e-3, "cpus_per_worker": 3}
    part |= {"batch_size": 8, "global_batch_size": 48}
    return job(model, output, sets, name=name, train=part | train)


def losses(config: JobConfig) -> list[float]:
    rows = [row for row in metrics(config) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def alone(
    tiny_model: Path, sets: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, connected: Any
) -> list[float]:
    """The losses of one worker on one machine."""
    config = spread_job(tiny_model, tmp_path_factory.mktemp("alone"), sets, "alone")
    run(config)
    return losses(config)


@pytest.fixture
def until_it_moves(head: LocalHead, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Does something, and lets the training stand still until the driver has taken notice: so no step is made in a
    time that depends on the machine."""
    asked, ask = threading.Event(), Execution._ask_to_move

    def notice(execution: Execution, why: str) -> None:
        ask(execution, why)
        asked.set()

    def act(cause: Callable[[], None]) -> None:
        workers = processes(head, "RayTrainWorker")
        for worker in workers:
            worker.suspend()
        try:
            cause()
            assert asked.wait(180)
        finally:
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.resume()

    monkeypatch.setattr(Execution, "_ask_to_move", notice)
    return act


def test_a_machine_is_taken_away(
    head: LocalHead,
    machine: Machine,
    until_it_moves: Callable[[Callable[[], None]], None],
    alone: list[float],
    tiny_model: Path,
    sets: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Two workers on two machines; one machine says that it will go. One worker goes on, and no step is made again."""

    def drain() -> None:
        preemption, deadline = 2, int(1000 * (time.time() + 300))  # DRAIN_NODE_REASON_PREEMPTION
        GcsClient(head.cluster_address).drain_node(machine.node_id(), preemption, "spot", deadline)

    leaving = spread_job(tiny_model, tmp_path, sets, "leaving", workers=2, min_workers=1, max_failures=0)
    with at_step(leaving, MOVE_AT, lambda: until_it_moves(drain)):
        result, _ = run(leaving)
    (event,) = result["breaks"]
    assert event["kind"] == "moved"
    assert event["what"] == "1 node(s) will be taken away"
    assert MOVE_AT <= event["from_step"] < STEPS
    assert event["seconds"] > 0
    assert losses(leaving) == pytest.approx(alone, abs=1e-4)


def test_a_machine_dies(
    machine: Machine, alone: list[float], tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    killed = spread_job(tiny_model, tmp_path, sets, "killed", workers=2, min_workers=1)
    with at_step(killed, KILL_AT, machine.die):
        result, _ = run(killed)
    (event,) = result["breaks"]
    assert event["kind"] == "fault"
    assert event["seconds"] > 0
    assert losses(killed) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("engine", ["none", "zero2"])
def test_a_machine_is_added(
    engine: str,
    head: LocalHead,
    until_it_moves: Callable[[Callable[[], None]], None],
    alone: list[float],
    tiny_model: Path,
    sets: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A job for two workers begins with the one for which there is room, and goes on with two when a machine comes."""
    monkeypatch.setattr("rayloom.train.execution._GROW_SECONDS", 5.0)
    growing = spread_job(tiny_model, tmp_path, sets, "growing", workers=2, min_workers=1, deepspeed=engine)
    added: list[Machine] = []
    try:
        with at_step(growing, MOVE_AT, lambda: until_it_moves(lambda: added.append(Machine.beside(head)))):
            result, _ = run(growing)
    finally:
        for machine in added:
            machine.end()
        wait_for_nodes(head, 1)
    (event,) = result["breaks"]
    assert (event["kind"], event["what"]) == ("moved", "there is room for 2 workers")
    assert MOVE_AT <= event["from_step"] < STEPS
    assert losses(growing) == pytest.approx(alone, abs=1e-4)
