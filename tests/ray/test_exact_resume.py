"""A worker that is killed in the middle of a training that draws random numbers: the run is the undisturbed one, bit
for bit, and trains again within a minute."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from tests.ray.small_jobs import job, metrics, run, write_rows
from tests.ray.test_recovery import at_step, kill, same_run

from rayloom.config.job import JobConfig
from rayloom.jobs.local_head import LocalHead

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected"), pytest.mark.timeout(600)]

STEPS, KILL_AT, SAVE = 24, 17, 5
SECONDS = 60.0  # from the death to the first new step, at most
CLOCKED = {"tokens_per_second", "data_wait", "step_seconds"}  # in a row of metrics


def texts(generator: random.Random) -> tuple[str, str]:
    words = "river stone lamp cloud seven garden window".split()
    question, answer = (" ".join(generator.choices(words, k=generator.randint(1, 9))) for _ in range(2))
    return question, answer


def pairs(folder: Path) -> dict[str, Any]:
    """Two answers to each question; the second one is the worse."""
    path, generator = folder / "pairs.jsonl", random.Random(1)
    rows = []
    for number in range(200):
        question, answer = texts(generator)
        rows.append({"instruction": f"{number}: {question}?", "output": [answer, answer + " no"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "ranking": True}


def judgements(folder: Path) -> dict[str, Any]:
    """One answer to each question, good or bad."""
    path, generator = folder / "judged.jsonl", random.Random(1)
    rows = []
    for number in range(200):
        question, answer = texts(generator)
        good = generator.random() < 0.5
        turns = [{"role": "user", "content": f"{number}: {question}?"}]
        turns += [{"role": "assistant", "content": answer if good else answer + " no"}]
        rows.append({"messages": turns, "label": good})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "format": "openai", "columns": {"messages": "messages", "kto_tag": "label"}}


def answers(folder: Path) -> dict[str, Any]:
    return {"path": str(write_rows(folder / "rows.jsonl", 200))}


# What is drawn in each: the adapter's dropout, and NEFTune's noise.
CASES: dict[str, tuple[dict[str, Any], Any, int]] = {
    "dpo": ({"type": "dpo"}, pairs, 4),
    "neftune": ({"neftune": 5.0}, answers, 6),
    "kto": ({"type": "kto", "beta": 0.5}, judgements, 6),
}


def long_job(
    name: str, model: Path, folder: Path, stage: dict[str, Any], data: dict[str, Any], accumulation: int, **train: Any
) -> JobConfig:
    """A third of a second for a step: a checkpoint counts when Ray Train has looked, which it does every two."""
    slow = {"batch_size": 8, "gradient_accumulation": accumulation, "learning_rate": 1e-3}
    part = {"max_steps": STEPS, "save_steps": SAVE, **slow, **train}
    method = {"type": "lora", "dropout": 0.2}
    return job(model, folder, [data], name=name, stage=stage, method=method, train=part)


def run_and_kill(config: JobConfig, head: LocalHead, step: int) -> dict[str, Any]:
    """Run a job whose worker is killed once, and that soon trains again; what `result.json` says of the break."""
    died: list[float] = []

    def act() -> None:
        died.append(time.time())
        kill(head, "RayTrainWorker")

    with at_step(config, step, act):
        result, _ = run(config)
    (event,) = result["breaks"]
    assert event["kind"] == "fault"
    # Its `seconds` begin when the driver has noticed, and end with the first row of a new step.
    assert event["time"] > died[0]
    assert event["time"] + event["seconds"] - died[0] < SECONDS
    return event


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_equals_undisturbed(name: str, head: LocalHead, tiny_model: Path, tmp_path: Path) -> None:
    stage, write, accumulation = CASES[name]
    whole, killed = (
        long_job(one, tiny_model, tmp_path, stage, write(tmp_path), accumulation) for one in ("whole", "killed")
    )
    run(whole)
    event = run_and_kill(killed, head, KILL_AT)
    assert SAVE <= event["from_step"] < KILL_AT
    same_run(whole, killed)


def test_a_row_of_metrics_ends_at_a_checkpoint(head: LocalHead, tiny_model: Path, tmp_path: Path) -> None:
    """So a resumed job's rows are of the same steps: it begins between two rows of ten steps."""
    train = {"logging_steps": 10, "save_steps": 4}
    whole, killed = (
        long_job(one, tiny_model, tmp_path, {}, answers(tmp_path), 6, **train) for one in ("whole", "killed")
    )
    _, rows = run(whole)
    assert [row["step"] for row in rows] == [4, 8, 10, 12, 16, 20, 24]
    event = run_and_kill(killed, head, 20)
    assert event["from_step"] in (4, 8, 12, 16)
    found = [
        [{name: value for name, value in row.items() if name not in CLOCKED} for row in of_run]
        for of_run in (rows, metrics(killed))
    ]
    assert found[0] == found[1]
    same_run(whole, killed)
