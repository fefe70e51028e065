"""A fleet of two real engines on a local cluster: rounds, weights, and engines that die or hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from tests.engine.reference import (
    PROBE,
    adapted,
    adapter_weights,
    agrees,
    full_weights,
    next_log_probs,
    noisy,
    prompts,
    referring,
)

from rayloom.errors import JobError, RequestError
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.fleet import FleetClient, start_fleet
from rayloom.rollout.request import EngineOptions, Rollout, Sampling, Weights
from rayloom.train.policy_sync import PolicySync

CONFIG = RolloutConfig(
    engines=2, kv_cache_gib=0.25, generate_timeout=15, sync_timeout=60, start_timeout=200, max_restarts=4
)
LONG = Sampling(max_tokens=100, temperature=0.7, min_tokens=100)
SHORT = Sampling(max_tokens=8, temperature=0.7)


def _options(model: Path) -> EngineOptions:
    return EngineOptions(str(model), "fp32", 256, adapter_rank=4, kv_cache_gib=0.25)


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, cluster: None) -> Iterator[FleetClient]:
    client = start_fleet(CONFIG, _options(tiny_model), PROBE)
    yield client
    client.stop()


@pytest.fixture(scope="module")
def numbers() -> Iterator[Any]:
    """Numbers of rounds and versions, each once."""
    return iter(range(1, 1000))


def _sync(fleet: FleetClient, model: Path, version: int) -> Any:
    policy = adapted(model, version)
    served = fleet.sync(referring(*adapter_weights(policy, version)))
    assert [(one.engine, one.version) for one in served] == [(0, version), (1, version)]
    return policy


def _texts(rollouts: list[Rollout]) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(rollout.prompt, rollout.sample, rollout.token_ids) for rollout in rollouts]


def test_ranks_get_the_answers_to_their_own_prompts(tiny_model: Path, fleet: FleetClient, numbers: Any) -> None:
    version = next(numbers)
    policy = _sync(fleet, tiny_model, version)
    asked = prompts(9, samples=2)
    first, second, third = next(numbers), next(numbers), next(numbers)
    fleet.probes()
    whole = fleet.generate(first, 0, 1, asked, SHORT)
    probes = fleet.probes()
    assert {(probe.engine, probe.version) for probe in probes} == {(0, version), (1, version)}
    assert all(agrees(policy, probe) for probe in probes)
    assert [(r.prompt, r.sample) for r in whole] == [(n, s) for n in range(9) for s in range(2)]
    assert {r.engine for r in whole} == {0, 1}
    assert {r.policy_version for r in whole} == {version}
    for number, order in ((second, (0, 1)), (third, (1, 0))):  # whoever asks first
        pending = {rank: fleet.ask(number, rank, 2, asked[rank::2], SHORT) for rank in order}
        parts = {rank: pending[rank].collect() for rank in (0, 1)}
        assert _texts(parts[0]) == [text for text in _texts(whole) if text[0] % 2 == 0]
        assert _texts(parts[1]) == [text for text in _texts(whole) if text[0] % 2 == 1]
        engines = {(r.prompt, r.sample): r.engine for r in [*parts[0], *parts[1]]}
        assert engines == {(r.prompt, r.sample): r.engine for r in whole}
    assert fleet.probes() == []  # once for a version


def test_weights_come_behind_rounds_that_were_asked_for(tiny_model: Path, fleet: FleetClient, numbers: Any) -> None:
    old, new, first, second = (next(numbers) for _ in range(4))
    _sync(fleet, tiny_model, old)
    before = fleet.ask(first, 0, 1, prompts(4), SHORT)
    _sync(fleet, tiny_model, new)
    after = fleet.ask(second, 0, 1, prompts(4), SHORT)
    assert {r.policy_version for r in before.collect()} == {old}
    assert {r.policy_version for r in after.collect()} == {new}
    metrics = fleet.metrics()
    assert metrics["version"] == new
    assert metrics["tokens"] > 0


def test_other_ranks_wait_until_the_weights_are_served(tiny_model: Path, fleet: FleetClient, numbers: Any) -> None:
    version = next(numbers)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(fleet.wait_for, version)
        _sync(fleet, tiny_model, next(numbers))
        assert not waiting.done()
        _sync(fleet, tiny_model, version)
        waiting.result(timeout=30)
    fleet.wait_for(version)  # at once


def test_weights_that_are_not_what_was_said_stop_the_job(tiny_model: Path, fleet: FleetClient, numbers: Any) -> None:
    version = next(numbers)
    weights, tensors = adapter_weights(adapted(tiny_model, version), version)
    for lost, said in (("q_proj.lora_A", "serves tensors 27 instead of 28"), ("o_proj.lora_B", "27 tensors of 28")):
        some = {name: tensor for name, tensor in tensors.items() if not (".layers.1." in name and lost in name)}
        with pytest.raises(JobError, match=rf"version {version} did not arrive: engine \d .*{said}"):
            fleet.sync(referring(weights, some))
    _sync(fleet, tiny_model, next(numbers))  # the engines are still there


def test_the_trainer_compares_what_it_and_every_engine_compute(
    tiny_model: Path, fleet: FleetClient, numbers: Any
) -> None:
    sync = PolicySync(fleet, {"fp32"}, is_first_rank=True)
    first, second = next(numbers), next(numbers)
    policies = {version: adapted(tiny_model, version) for version in (first, second)}
    fleet.probes()
    for ahead in (False, True):  # of a round that was asked ahead the next turn hears
        number, version = next(numbers), next(numbers)
        policy = adapted(tiny_model, version)
        sync.serve(version, policy)
        pending = fleet.ask(number, 0, 1, prompts(4), SHORT)
        if not ahead:
            pending.collect()
        sync.compare(lambda ids, policy=policy: next_log_probs(policy, ids).float())
        if ahead:
            pending.collect()
    sync.serve(first, policies[first])
    fleet.generate(next(numbers), 0, 1, prompts(4), SHORT)
    sync.difference = 1.0
    sync.compare(lambda ids: next_log_probs(policies[first], ids).float())
    assert sync.difference < 1e-3
    sync.serve(second, policies[second])
    fleet.generate(next(numbers), 0, 1, prompts(4), SHORT)
    said = rf"engine [01] does not compute what the trainer computes: with the weights of version {second} the log-prob"
    with pytest.raises(JobError, match=said):
        sync.compare(lambda ids: next_log_probs(policies[first], ids).float())


@pytest.mark.parametrize(("precisions", "may"), [({"fp32"}, False), ({"bf16"}, True), ({"fp32", "bf16"}, True)])
def test_the_coarser_precision_says_how_far_they_may_be_apart(
    precisions: set[str], may: bool, tiny_model: Path, fleet: FleetClient, numbers: Any
) -> None:
    """0.04 is what bf16 makes of a model of a billion parameters, and a hundred times what fp32 does."""
    sync = PolicySync(fleet, precisions, is_first_rank=True)
    fleet.probes()
    version = next(numbers)
    policy = adapted(tiny_model, version)
    sync.serve(version, policy)
    fleet.generate(next(numbers), 0, 1, prompts(4), SHORT)
    with nullcontext() if may else pytest.raises(JobError, match=r"differ by 0\.04 on average, and may by 0\.005"):
        sync.compare(lambda ids: next_log_probs(policy, ids).float() + 0.04)
    assert sync.difference == pytest.approx(0.04, abs=1e-3)


def test_an_engine_that_is_killed_comes_back_with_the_weights(
    tiny_model: Path, fleet: FleetClient, numbers: Any
) -> None:
    version, *rounds = (next(numbers) for _ in range(5))
    _sync(fleet, tiny_model, version)
    asked = prompts(48, samples=4)
    undisturbed = fleet.generate(rounds[0], 0, 1, asked, LONG)
    began = time.monotonic()
    fleet.generate(rounds[1], 0, 1, asked, LONG)  # the first one takes several times as long
    whole = time.monotonic() - began
    pending = fleet.ask(rounds[2], 0, 1, asked, LONG)
    time.sleep(whole / 3)
    os.kill(fleet.processes()[1], signal.SIGKILL)
    disturbed = pending.collect()
    assert _texts(disturbed) == _texts(undisturbed)
    assert {r.policy_version for r in disturbed} == {version}
    event = _served_again(fleet)
    assert event["engine"] == 1
    assert "engine 1 died while it was to generate" in event["what"]
    assert 0 < event["seconds"] < 60
    afterwards = fleet.generate(rounds[3], 0, 1, asked, LONG)
    assert {r.engine for r in afterwards} == {0, 1}
    assert _texts(afterwards) == _texts(undisturbed)
    assert fleet.metrics()["restarts"] == 1
    _sync(fleet, tiny_model, next(numbers))


def test_an_engine_that_hangs_is_ended_and_started_again(tiny_model: Path, fleet: FleetClient, numbers: Any) -> None:
    version, first = next(numbers), next(numbers)
    _sync(fleet, tiny_model, version)
    hanging = fleet.processes()[0]
    os.kill(hanging, signal.SIGSTOP)
    rollouts = fleet.generate(first, 0, 1, prompts(6), SHORT)
    assert {r.policy_version for r in rollouts} == {version}
    assert {r.engine for r in rollouts} == {1}
    event = _served_again(fleet)
    assert "the fleet waited 15 s for engine 0 to generate (rollout.generate_timeout)" in event["what"]
    assert fleet.processes()[0] != hanging
    with pytest.raises(ProcessLookupError):
        os.kill(hanging, 0)


@pytest.mark.slow
def test_engines_that_share_gpus_are_all_asleep_before_a_round_is_handed_out(tiny_model: Path, cluster: None) -> None:
    """Also one that died meanwhile: it would wake beside a trainer that has its memory."""
    config = CONFIG.model_copy(update={"share_gpus": True})
    fleet = start_fleet(config, _options(tiny_model), PROBE)
    try:
        _sync(fleet, tiny_model, 1)
        asked = prompts(48, samples=4)
        fleet.generate(1, 0, 1, asked, LONG)
        pending = fleet.ask(2, 0, 1, asked, LONG)
        time.sleep(0.3)
        os.kill(fleet.processes()[1], signal.SIGKILL)
        assert len(pending.collect()) == 48 * 4
        (event,) = fleet.events()
        assert event["seconds"] is not None  # it serves again, and was told to rest
        assert fleet.processes().keys() == {0, 1}
        assert [gpus for _, gpus in fleet.gpus()] == [(), ()]
    finally:
        fleet.stop()


@pytest.mark.slow
def test_new_weights_wait_for_an_engine_that_dies_again_while_it_starts(
    tiny_model: Path, cluster: None, numbers: Any
) -> None:
    client = start_fleet(CONFIG.model_copy(update={"sync_timeout": 15}), _options(tiny_model), PROBE)
    try:
        _sync(client, tiny_model, next(numbers))
        killed = client.processes()[1]
        os.kill(killed, signal.SIGKILL)
        client.generate(next(numbers), 0, 1, prompts(6), SHORT)  # engine 0 answers, engine 1 is being started

        def kill_again() -> None:
            while (found := client.processes().get(1, killed)) == killed:
                time.sleep(0.05)
            os.kill(found, signal.SIGKILL)

        thread = threading.Thread(target=kill_again, daemon=True)
        thread.start()
        _sync(client, tiny_model, next(numbers))
        thread.join(10)
        assert client.metrics()["restarts"] == 2
        os.kill(client.processes()[0], signal.SIGSTOP)
        _sync(client, tiny_model, next(numbers))  # the trainer gets the word of the engine that was started again too
        assert "the fleet waited 15 s for engine 0 to sync" in client.events()[-1]["what"]
        assert all(event["seconds"] is not None for event in client.events())
        assert {r.engine for r in client.generate(next(numbers), 0, 1, prompts(6), SHORT)} == {0, 1}
    finally:
        client.stop()


@pytest.mark.slow
def test_whole_weights_that_went_with_the_trainer_come_with_the_next_one(
    tiny_model: Path, cluster: None, numbers: Any
) -> None:
    """A machine dies on which the trainer and an engine were: nobody has the weights that the new engine should get."""
    options = replace(_options(tiny_model), adapter_rank=None)
    client = start_fleet(CONFIG.model_copy(update={"engines": 1}), options, PROBE)
    try:
        trainer = ray.remote(num_cpus=0)(_Trainer).remote()
        weights, tensors = full_weights(noisy(tiny_model, 1), next(numbers))
        client.sync(replace(weights, tensors=ray.get(trainer.put.remote(tensors))[0]))
        ray.kill(trainer)
        os.kill(client.processes()[0], signal.SIGKILL)
        with pytest.raises(JobError, match="before it had any weights"):
            client.generate(next(numbers), 0, 1, prompts(2), SHORT)
        client.abandon()
        model = noisy(tiny_model, 2)
        weights, tensors = full_weights(model, next(numbers))
        client.sync(replace(weights, tensors=ray.put(tensors)))
        (event,) = client.events()
        assert event["seconds"] is not None
        assert len(client.generate(next(numbers), 0, 1, prompts(2), SHORT)) == 2
        (probe,) = client.probes()
        assert agrees(model, probe)
    finally:
        client.stop()


class _Trainer:
    """Owns what it puts into the object store: it goes with it."""

    def put(self, tensors: Any) -> list[Any]:
        return [ray.put(tensors)]


def test_ranks_that_do_not_ask_are_named(fleet: FleetClient, numbers: Any, tiny_model: Path) -> None:
    number = next(numbers)
    pending = fleet.ask(number, 1, 3, prompts(2), SHORT)
    with pytest.raises(JobError, match=rf"waited 15 s for the prompts of rank 0, 2 in round {number}"):
        pending.collect()


def test_rounds_of_workers_that_are_gone_are_dropped(fleet: FleetClient, numbers: Any, tiny_model: Path) -> None:
    number = next(numbers)
    pending = fleet.ask(number, 0, 2, prompts(2), SHORT)
    fleet.abandon()
    with pytest.raises(JobError, match=f"round {number} was dropped"):
        pending.collect()
    assert len(fleet.generate(number, 0, 1, prompts(2), SHORT)) == 2


@pytest.mark.slow  # waits half a minute, for a cluster that may grow
def test_more_engines_than_the_cluster_holds(tiny_model: Path, cluster: None) -> None:
    began = time.monotonic()
    with pytest.raises(RequestError, match=r"rollout.engines: 9: each needs 1 CPU, and the cluster has 4 CPU"):
        start_fleet(CONFIG.model_copy(update={"engines": 9}), _options(tiny_model), PROBE)
    assert time.monotonic() - began < 60


def test_a_fleet_without_a_trainer_serves_the_model_itself(fleet: FleetClient, numbers: Any) -> None:
    (served, _) = fleet.sync(Weights.of_base())
    assert (served.version, served.count) == (0, 0)
    assert len(fleet.generate(next(numbers), 0, 1, [replace(prompts(1)[0], samples=3)], SHORT)) == 3


def _served_again(fleet: FleetClient) -> dict[str, Any]:
    """The last event, once it is over."""
    deadline = time.monotonic() + 120
    while (event := fleet.events()[-1])["seconds"] is None:
        assert time.monotonic() < deadline, event
        time.sleep(0.5)
    return event
