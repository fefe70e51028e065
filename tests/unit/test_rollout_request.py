"""Digests, probes, and what a sync is checked by."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open

from rayloom.errors import JobError
from rayloom.rollout.adapter_folders import pack, stored_tensors
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.digest import Digest, digest_of
from rayloom.rollout.fleet import patience_of
from rayloom.rollout.members import Members, _end_process
from rayloom.rollout.request import BLOCK, EngineOptions, Probe, Rollout, Served, Weights, difference, probe_prompt

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
WEIGHTS = Weights(4, "adapter", None, 2, digest_of(TENSORS), {})
SERVED = Served(1, 4, 2, digest_of(TENSORS))
PROBE = Probe(1, 4, (5,), (-0.5,))


def test_an_answer_of_no_numbers_is_none() -> None:
    with pytest.raises(
        JobError, match=r"engine 1 answered prompt 7 with log-probabilities that are no numbers; .* version 4"
    ):
        Rollout(7, 0, (5, 6), (-0.5, float("nan")), "stop", policy_version=4, engine=1)


def test_a_digest_does_not_depend_on_the_order_of_tensors() -> None:
    assert digest_of(TENSORS) == digest_of(dict(reversed(TENSORS.items())))
    digest = Digest()
    for name in ("a", "b"):
        digest.add(name, TENSORS[name])
    assert (digest.count, str(digest)) == (2, digest_of(TENSORS))


@pytest.mark.parametrize(
    "changed",
    [
        {"b": TENSORS["b"], "c": TENSORS["a"]},
        {"b": TENSORS["b"].reshape(3, 2), "a": TENSORS["a"]},
        {"b": TENSORS["b"], "a": TENSORS["a"].to(torch.float16)},
        {"b": torch.nextafter(TENSORS["b"], torch.tensor(9.0)), "a": TENSORS["a"]},
        {"b": TENSORS["b"]},
    ],
    ids=["name", "shape", "type", "last bit", "missing"],
)
def test_a_digest_tells_apart(changed: dict[str, torch.Tensor]) -> None:
    assert digest_of(changed) != digest_of(TENSORS)


def test_a_view_has_the_digest_of_its_values() -> None:
    wide = torch.arange(12.0).reshape(2, 6)
    assert digest_of({"x": wide[:, :3]}) == digest_of({"x": wide[:, :3].clone()})
    assert digest_of({"x": torch.tensor(1.0)}) != digest_of({"x": torch.tensor([1.0])})  # a scalar has a digest too


def test_the_difference_names_engine_and_what_differs() -> None:
    assert difference(WEIGHTS, SERVED) is None
    assert difference(WEIGHTS, replace(SERVED, version=3)) == "engine 1 serves version 3 instead of 4"
    assert difference(WEIGHTS, replace(SERVED, count=1, digest="x")) == (
        f"engine 1 serves tensors 1 instead of 2, digest x instead of {WEIGHTS.digest}"
    )


@pytest.mark.parametrize(
    ("token_ids", "log_probs", "most"),
    [
        ((5, 6, 7), (-0.5, -1.0, -2.0), None),
        ((6, 5, 7), (-0.5, -0.5, -2.0), 0.5),  # one token's says otherwise
        ((5, 6, 8), (-0.5, -1.0, -2.0004), None),  # a near tie at the end of the list
        ((5, 6, 8), (-0.5, -1.0, -1.4), 0.6),  # no tie: the other one has it below -2
        ((9, 6, 7), (-0.5, -1.0, -2.0), 1.5),
    ],
)
def test_two_engines_must_say_the_same_of_a_probe(
    token_ids: tuple[int, ...], log_probs: tuple[float, ...], most: float | None
) -> None:
    members = Members(RolloutConfig(), EngineOptions("m", "fp32", 64), (1,))
    accepted = replace(PROBE, engine=0, token_ids=(5, 6, 7), log_probs=(-0.5, -1.0, -2.0))
    said = members._deviation(replace(PROBE, token_ids=token_ids, log_probs=log_probs), accepted)
    if most is None:
        assert said is None
    else:
        assert said == (f"engine 1 answers the probe otherwise than engine 0: log-probabilities differ by {most:.4f}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapters_file_is_what_safetensors_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    wide = torch.arange(60.0, dtype=dtype).reshape(6, 10)
    tensors = {"b": wide[:, :3], "an odd name with ä": wide[0, 0], "a": torch.ones(3, dtype=dtype)}
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(pack(tensors))
    found = stored_tensors(str(tmp_path))
    assert digest_of(found) == digest_of(tensors)
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(tensors)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 100])
def test_a_probes_prompt_fills_a_block_of_the_cache(length: int) -> None:
    prompt = probe_prompt(tuple(range(length)))
    assert len(prompt) == BLOCK + 1
    assert prompt[:length] == tuple(range(length))[: BLOCK + 1]


def test_a_fleet_is_lost_only_after_all_that_may_stand_before_a_call() -> None:
    config = RolloutConfig(max_staleness=16, generate_timeout=100, start_timeout=10, sync_timeout=1, max_restarts=0)
    # Seventeen rounds, each with its wait for the last rank and its answers, then the sync itself.
    assert patience_of(config) > 17 * 2 * 100 + 1
    assert patience_of(config.model_copy(update={"max_restarts": 2})) >= patience_of(config) + 2 * (100 + 10 + 1)


def test_an_engine_is_ended_with_the_processes_that_it_has_started() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        worker = psutil.Process(int(engine.stdout.readline()))
        worker.suspend()  # it hangs
        created = psutil.Process(engine.pid).create_time()
        _end_process(engine.pid, created - 60)  # of an earlier process with the same number
        assert engine.poll() is None
        _end_process(engine.pid, created)
        assert not psutil.pid_exists(engine.pid)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
