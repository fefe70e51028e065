"""Stage ppo whose driver is killed: what goes on from its checkpoint is to the bit what would have come without."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ray import test_ppo
from tests.ray.small_jobs import metrics, run
from tests.ray.test_ppo import policy, ppo_job
from tests.ray.test_recovery import at_step, kill
from transformers import AutoTokenizer

from rayloom.config.document import dump_document
from rayloom.config.job import JobConfig
from rayloom.data.rows import row_name
from rayloom.jobs.local_head import LocalHead
from rayloom.train.checkpoints import SNAPSHOT, step_of
from rayloom.train.ppo_state import PpoState
from rayloom.train.run_dir import find_run

pytestmark = [pytest.mark.usefixtures("connected"), pytest.mark.slow, pytest.mark.timeout(600)]

model, folder = test_ppo.model, test_ppo.folder


def kill_driver(config: JobConfig, after: int) -> tuple[Path, int]:
    """Run a job as a process of its own, and kill it with SIGKILL as soon as a checkpoint of step `after` or a later
    one counts, whatever it is at; the checkpoint that it will go on from, and its step."""
    file = config.run_dir.with_suffix(".yaml")
    file.write_text(dump_document(config.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-m", "rayloom", "train", str(file)], env=dict(os.environ), start_new_session=True
    )
    try:
        until = time.monotonic() + 300
        while not any((step_of(name) or 0) >= after for name in listed(config)):
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    time.sleep(3)  # Ray ends what the driver has started
    checkpoint = find_run(config).latest_checkpoint()
    assert checkpoint is not None
    step = step_of(checkpoint.name)
    assert step is not None
    return checkpoint, step


def listed(config: JobConfig) -> list[str]:
    """The checkpoints that count: Ray Train looks every two seconds."""
    file = config.run_dir / "checkpoints" / SNAPSHOT
    return re.findall(r"step-\d+", file.read_text()) if file.exists() else []


def manifest(config: JobConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "manifest.jsonl").read_text().splitlines()]


def last_state(config: JobConfig) -> PpoState:
    checkpoint = find_run(config).latest_checkpoint()
    assert checkpoint is not None
    return PpoState.load(checkpoint)


def same_run(whole: JobConfig, resumed: JobConfig) -> None:
    """To the bit, and with the same prompts in the same rounds: none is lost, none is learnt from twice."""
    for key in ("step", "loss", "reward", "kl", "kl_coefficient", "policy_version", "staleness"):
        values = [[row[key] for row in metrics(config)] for config in (whole, resumed)]
        assert values[0] == values[1], key
    assert manifest(whole) == manifest(resumed)
    assert last_state(whole).rewards == last_state(resumed).rewards
    assert last_state(whole).kl == last_state(resumed).kl
    one, other = policy(whole), policy(resumed)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_killed_job_goes_on_where_it_was(model: Path, folder: Path, tmp_path: Path) -> None:
    """With rewards that are normalized by all of those before: what is known of them must come back too."""
    rounds, steps = 12, 8
    parts: dict[str, Any] = {
        "data": {"manifest": True},
        "stage": {"epochs": 4, "whiten": False, "kl": {"coefficient": 0.1, "target": 0.5, "horizon": 100}},
        "rewards": {"normalize": True},
        "train": {"max_steps": rounds * steps, "save_steps": steps},
    }

    def made(name: str, **more: Any) -> JobConfig:
        return ppo_job(model, folder, tmp_path, name, **json.loads(json.dumps(parts)), **more)

    whole, killed = made("whole"), made("killed")
    run(whole)
    checkpoint, step = kill_driver(killed, after=2 * steps)
    before = metrics(killed)
    state = PpoState.load(checkpoint)
    assert 2 * steps <= step < rounds * steps
    assert (state.rounds, state.ahead) == (step // steps, [])
    assert state.rewards.count == 32 * state.rounds
    run(made("killed", resume=True))
    assert metrics(killed)[:step] == before[:step]  # with their times: these steps were not made again
    same_run(whole, killed)
    examples = [row for line in manifest(killed) for row in line["examples"]]
    assert [line["step"] for line in manifest(killed)] == [n * steps + 1 for n in range(rounds)]
    assert len(examples) == 32 * rounds
    counts = Counter(map(tuple, examples))
    assert len(counts) == 200
    assert set(counts.values()) == {1, 2}  # into the second epoch
    assert len({row["kl_coefficient"] for row in metrics(killed)}) > rounds / 2


def test_a_worker_that_dies(head: LocalHead, model: Path, folder: Path, tmp_path: Path) -> None:
    """The job goes on by itself, with the same engines, and comes to the same."""
    parts: dict[str, Any] = {
        "data": {"manifest": True},
        "stage": {"epochs": 8},
        "rewards": {"normalize": True},
        "train": {"max_steps": 8 * 16, "save_steps": 16},
    }

    def made(name: str) -> JobConfig:
        return ppo_job(model, folder, tmp_path, name, **json.loads(json.dumps(parts)))

    whole, killed = made("whole"), made("killed")
    run(whole)
    with at_step(killed, 100, lambda: kill(head, "RayTrainWorker")):
        result, _ = run(killed)
    (event,) = result["breaks"]
    assert event["kind"] == "fault"
    assert event["from_step"] % 16 == 0
    assert 0 < event["seconds"] < 60
    assert result["engine_breaks"] == []
    same_run(whole, killed)


def test_answers_that_were_there_are_learnt_from_and_not_asked_again(model: Path, folder: Path, tmp_path: Path) -> None:
    """One epoch of ten rounds, so that nothing is asked behind the last one. The engines answer a round while twelve
    steps are made of the one before."""
    rounds, prompts, steps = 10, 20, 12
    parts: dict[str, Any] = {
        "data": {"manifest": True},
        "rollout": {"max_staleness": 1},
        "stage": {"prompts": prompts, "epochs": 6, "kl": {"coefficient": 0.1, "target": 0.5, "horizon": 100}},
        "rewards": {"normalize": True},
        "train": {"batch_size": 10, "max_steps": None, "epochs": 1, "save_steps": steps},
    }

    def made(name: str, **more: Any) -> JobConfig:
        return ppo_job(model, folder, tmp_path, name, **json.loads(json.dumps(parts)), **more)

    whole, killed = made("whole"), made("killed")
    result, rows = run(whole)
    assert result["engines"]["prompts"] == rounds * prompts
    assert [row["staleness"] for row in rows[::steps]] == [0.0, *[1.0] * (rounds - 1)]
    checkpoint, step = kill_driver(killed, after=2 * steps)
    state = PpoState.load(checkpoint)
    (kept,) = state.ahead
    answers = kept.answers or []
    assert 2 <= state.rounds == kept.number == step // steps < rounds - 1
    assert len(answers) == len(kept.asked) == prompts
    assert {answer.rollout.policy_version for answer in answers} == {state.rounds - 1}

    result, rows = run(made("killed", resume=True))
    assert result["engines"]["prompts"] == (rounds - state.rounds - 1) * prompts
    first = rows[step]
    assert (first["step"], first["policy_version"], first["staleness"]) == (step + 1, state.rounds, 1.0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.decode(answer.rollout.token_ids, skip_special_tokens=True) for answer in answers]
    vowels = [sum(letter in "aeiou" for letter in text) / 12 for text in texts]
    assert first["reward"] == pytest.approx(sum(vowels) / prompts, rel=1e-12)
    lengths = [len(answer.rollout.token_ids) for answer in answers]
    assert first["answer_tokens"] == pytest.approx(sum(lengths) / prompts, rel=1e-12)
    (line,) = [line for line in manifest(killed) if line["step"] == step + 1]
    assert [name for _, name in line["examples"]] == [row_name(answer.asked.row) for answer in answers]
    examples = [tuple(row) for line in manifest(killed) for row in line["examples"]]
    assert len(examples) == len(set(examples)) == rounds * prompts
    same_run(whole, killed)
