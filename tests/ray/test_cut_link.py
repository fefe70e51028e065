"""The link between two machines is cut while they train: nobody is told, and everybody who waits must give up in time.

Head and driver are in one network namespace, the second machine is in another; they share a folder.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.ray.machines import Machine
from tests.ray.namespaces import ADDRESSES, Network, NotPermittedError
from tests.ray.small_jobs import job, metrics, write_rows

from rayloom.config.job import JobConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, CUT_AT = 40, 17  # of a quarter of a second, on two cores; a checkpoint is made every five
HEAD = f"{ADDRESSES[0]}:6379"
SECONDS = 4  # Ray's defaults make it a minute


def silence(seconds: int) -> dict[str, str]:
    """After so many seconds, and some more, the head takes a node for dead that says nothing."""
    return {
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": str(seconds),
    }


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **silence(SECONDS)}


@pytest.fixture(scope="module")
def network(environment: dict[str, str]) -> Iterator[Network]:
    with network_with_head(environment) as made:
        yield made


@contextmanager
def network_with_head(environment: dict[str, str]) -> Iterator[Network]:
    """Two namespaces; a Ray head is in the first."""
    try:
        with Network() as made, tempfile.TemporaryDirectory(prefix="rl-") as folder:
            log = Path(folder) / "head.log"
            options = ("--head", "--include-dashboard=false", "--port=6379", f"--temp-dir={folder}")
            head = Machine(
                *options, f"--node-ip-address={ADDRESSES[0]}", environment=environment, enter=made.enter(0), log=log
            )
            try:
                wait_for(lambda: "Ray runtime started" in log.read_text(), 120, "the head's start")
                yield made
            finally:
                head.end()
    except NotPermittedError as error:
        pytest.skip(f"no network namespaces here: {error}")


@contextmanager
def second_machine(network: Network, environment: dict[str, str]) -> Iterator[Machine]:
    options = (f"--address={HEAD}", f"--node-ip-address={ADDRESSES[1]}")
    machine = Machine(*options, environment=environment, enter=network.enter(1))
    try:
        yield machine
    finally:
        machine.end()
        network.mend()


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)


def train(
    network: Network, environment: dict[str, str], config: JobConfig, when: dict[str, Callable[[], None]]
) -> dict[str, Any]:
    """Run a job from the head's namespace, and do something at the first line of its log that has a given text."""
    file, waiting, seen = config.run_dir.parent / f"{config.name}.yaml", dict(when), []
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.Popen(
        [*network.enter(0), sys.executable, "-m", "rayloom", "train", str(file)],
        env={**os.environ, **environment, "RAY_ADDRESS": HEAD},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in process.stdout or []:
            seen.append(line)
            for text in [text for text in waiting if text in line]:
                waiting.pop(text)()
        assert process.wait(timeout=60) == 0, "".join(seen)
    finally:
        process.kill()
        process.wait()
    assert not waiting, "".join(seen)
    return dict(json.loads((config.run_dir / "result.json").read_text()))


def small_job(model: Path, folder: Path, name: str, **train_part: Any) -> JobConfig:
    rows = write_rows(folder / "rows.jsonl", 200)
    part = {"max_steps": STEPS, "save_steps": 5, "learning_rate": 1e-3, "cpus_per_worker": 3}
    part |= {"batch_size": 8, "global_batch_size": 48, "wait_for_resources": 120.0}
    return job(model, folder, [{"path": str(rows)}], name=name, train=part | train_part)


def losses(config: JobConfig) -> list[float]:
    rows = metrics(config)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def alone(
    network: Network, environment: dict[str, str], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of one worker, which nobody disturbs."""
    config = small_job(tiny_model, tmp_path_factory.mktemp("alone"), "alone")
    train(network, environment, config, {})
    return losses(config)


def test_goes_on_with_what_is_left(
    network: Network, environment: dict[str, str], alone: list[float], tiny_model: Path, tmp_path: Path
) -> None:
    config = small_job(tiny_model, tmp_path, "left", workers=2, min_workers=1)
    with second_machine(network, environment):
        result = train(network, environment, config, {f"step {CUT_AT} ": network.cut})
    (event,) = result["breaks"]
    assert event["kind"] == "fault"
    assert 0 < event["from_step"] <= CUT_AT
    assert losses(config) == pytest.approx(alone, abs=1e-4)


def test_goes_on_when_the_other_worker_notices_before_ray(
    environment: dict[str, str], alone: list[float], tiny_model: Path, tmp_path: Path
) -> None:
    """Ray still takes the machine for one that is there when the job wants to go on."""
    patient = environment | silence(40)  # longer than the worker waits, who must wait for a slow machine too
    config = small_job(tiny_model, tmp_path, "left", workers=2, min_workers=1, collective_timeout=20.0)
    with network_with_head(patient) as network, second_machine(network, patient):
        result = train(network, patient, config, {f"step {CUT_AT} ": network.cut})
    event = result["breaks"][0]
    assert "lost the connection to the others" in event["what"]
    assert 0 < event["from_step"] <= CUT_AT
    assert losses(config) == pytest.approx(alone, abs=1e-4)


def test_goes_on_with_both_when_the_link_is_mended(
    network: Network, environment: dict[str, str], alone: list[float], tiny_model: Path, tmp_path: Path
) -> None:
    """The machine that was cut off has been given up, and ends; it is started again."""
    config = small_job(tiny_model, tmp_path, "both", workers=2)
    with second_machine(network, environment) as first, ExitStack() as stack:

        def mend() -> None:
            network.mend()
            wait_for(lambda: not first.is_running(), 60, "the end of a node that was given up")
            stack.enter_context(second_machine(network, environment))

        result = train(network, environment, config, {f"step {CUT_AT} ": network.cut, "goes on from step": mend})
    (event,) = result["breaks"]
    assert event["kind"] == "fault"
    assert losses(config) == pytest.approx(alone, abs=1e-4)


def test_a_short_silence_breaks_nothing(
    network: Network, environment: dict[str, str], alone: list[float], tiny_model: Path, tmp_path: Path
) -> None:
    def blink() -> None:
        network.cut()
        time.sleep(2)
        network.mend()

    config = small_job(tiny_model, tmp_path, "blink", workers=2)
    with second_machine(network, environment):
        result = train(network, environment, config, {f"step {CUT_AT} ": blink})
    assert result["breaks"] == []
    assert losses(config) == pytest.approx(alone, abs=1e-4)
