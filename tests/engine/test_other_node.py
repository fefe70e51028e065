"""An engine on another machine than the trainer: a second node of the cluster with memory and temporary folders of its
own, which the first one cannot see, nor it theirs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.authentication_test_utils import reset_auth_token_state
from tests.engine.reference import PROBE, adapted, adapter_weights, agrees, next_log_probs, prompts, referring

from rayloom.errors import JobError, RequestError
from rayloom.jobs.local_head import LocalHead
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.fleet import start_fleet
from rayloom.rollout.request import EngineOptions, Sampling
from rayloom.train.policy_sync import PolicySync

_APART = ["unshare", "--map-root-user", "--mount"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        shutil.which("unshare") is None
        or subprocess.run([*_APART, "true"], capture_output=True, check=False).returncode != 0,
        reason="this system gives no process a view of its own of the folders (unshare)",
    ),
]


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is empty as the second node sees it."""
    return tmp_path_factory.mktemp("hidden")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, hidden: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The only node with a CPU, of a head that has none."""
    temp = tmp_path_factory.mktemp("temp")
    with LocalHead(num_cpus=0) as head, pytest.MonkeyPatch.context() as patch:
        for name, value in head.environment.items():
            patch.setenv(name, value)
        reset_auth_token_state()
        ray.init(address=head.cluster_address, namespace="rayloom", log_to_driver=False)
        start = (
            f"mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs {hidden} && exec {sys.executable} -m "
            "ray.scripts.scripts "
            f"start --block --disable-usage-stats --address={head.cluster_address} --num-cpus=2 --min-worker-port=0 "
            f"--max-worker-port=0 --object-store-memory=100000000"
        )
        process = subprocess.Popen(
            [*_APART, "sh", "-c", start],
            env={**os.environ, "TMPDIR": str(temp)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 90
            while ray.cluster_resources().get("CPU") != 2:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
            yield process
        finally:
            ray.shutdown()
            own = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for one in [*own, process]:
                try:
                    one.kill()
                except psutil.NoSuchProcess:
                    continue
            process.wait()
    reset_auth_token_state()


def test_adapters_reach_an_engine_that_sees_nothing_of_this_machine(
    node: subprocess.Popen[bytes], tiny_model: Path
) -> None:
    config = RolloutConfig(engines=1, kv_cache_gib=0.25, sync_timeout=60, start_timeout=200)
    mine = adapter_folders(os.getpid())
    fleet = start_fleet(config, EngineOptions(str(tiny_model), "fp32", 256, adapter_rank=4, kv_cache_gib=0.25), PROBE)
    try:
        engine = fleet.processes()[0]
        assert psutil.Process(engine) in psutil.Process(node.pid).children(recursive=True)
        sync = PolicySync(fleet, {"fp32"}, is_first_rank=True)
        for version in (1, 2):
            policy = adapted(tiny_model, version)
            sync.serve(version, policy)
            sync.compare(lambda ids, policy=policy: next_log_probs(policy, ids).float())
            # Memory of the engine's own node holds this version, and no other any more; here is nothing.
            (root,) = adapter_folders(engine)
            assert root.parent.name == "shm"
            assert [folder.name.split("-")[1] for folder in root.glob("version-*")] == [str(version)]
            assert adapter_folders(os.getpid()) == mine
        answers = fleet.generate(1, 0, 1, prompts(4), Sampling(max_tokens=8))
        assert {rollout.policy_version for rollout in answers} == {2}

        weights, tensors = adapter_weights(adapted(tiny_model, 3), 3)
        some = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name or "q_proj" not in name}
        with pytest.raises(JobError, match="version 3 did not arrive: engine 0"):
            fleet.sync(referring(weights, some))
        fleet.sync(referring(weights, tensors))
        fleet.generate(10, 0, 1, prompts(4), Sampling(max_tokens=8))
        _, probe = fleet.probes()  # of version 2, and of this one
        assert agrees(adapted(tiny_model, 3), probe)

        os.kill(engine, signal.SIGKILL)
        again = fleet.generate(2, 0, 1, prompts(4), Sampling(max_tokens=8))
        assert {rollout.policy_version for rollout in again} == {3}
        second = fleet.processes()[0]
        assert second != engine
        assert len(adapter_folders(second)) == 1  # what the killed one had left in memory is gone
    finally:
        fleet.stop()
    assert adapter_folders(node.pid) == []
    assert adapter_folders(os.getpid()) == mine


def test_a_model_that_is_on_the_trainers_machine_only(
    node: subprocess.Popen[bytes], hidden: Path, tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, hidden / "model")
    options = EngineOptions(str(hidden / "model"), "fp32", 256, kv_cache_gib=0.25)
    message = rf"no such model folder: {hidden}/model, on the machine of engine 0 \(\d+\..*every machine of the cluster"
    with pytest.raises(RequestError, match=message):
        start_fleet(RolloutConfig(engines=1, start_timeout=100), options, PROBE)


def adapter_folders(process: int) -> list[Path]:
    """Engines' folders in memory, as a process sees it."""
    return sorted(Path(f"/proc/{process}/root/dev/shm").glob("rayloom-engine-*"))
