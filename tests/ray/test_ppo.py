"""Stage ppo on Ray with real engines: it learns, a resumed job equals one that was not stopped, engines may die."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.ray.small_jobs import job, metrics, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.config.read import read_job
from rayloom.search.run import run_search

pytestmark = pytest.mark.usefixtures("connected")

REWARD = '''"""The share of an answer's letters that are vowels: a random model has few, and can learn to have many."""


def vowels(prompts, answers, references):
    return [sum(letter in "aeiou" for letter in answer) / 12 for answer in answers]
'''
STEPS_A_ROUND = 4


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger embeddings: else whatever its hidden states are, all tokens are about as likely."""
    made = tmp_path_factory.mktemp("model")
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        loaded.get_input_embeddings().weight.mul_(8)
    loaded.save_pretrained(made)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("prompts")
    rows = [{"instruction": f"word {n}?", "output": str(n)} for n in range(200)]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "rewards.py").write_text(REWARD)
    return made


def ppo_job(model: Path, folder: Path, output: Path, name: str, **parts: Any) -> JobConfig:
    """Rounds of 32 prompts, each learnt from in four steps."""
    stage = {"type": "ppo", "prompts": 32, "epochs": 2, "value_learning_rate": 1e-2, **parts.pop("stage", {})}
    train = {
        "batch_size": 16,
        "max_steps": 4 * STEPS_A_ROUND,
        "scheduler": "constant",
        "save_steps": 1000,
        "learning_rate": 5e-3,
    }
    rollout = {"max_tokens": 12, "kv_cache_gib": 0.25, **parts.pop("rollout", {})}
    source = {"type": "function", "path": f"{folder / 'rewards.py'}:vowels"}
    rewards = {"sources": [source], **parts.pop("rewards", {})}
    return job(
        model,
        output,
        [{"path": str(folder / "rows.jsonl")}],
        name,
        stage=stage,
        rollout=rollout,
        rewards=rewards,
        train={**train, **parts.pop("train", {})},
        **parts,
    )


def policy(config: JobConfig) -> dict[str, torch.Tensor]:
    return load_file(config.run_dir / "model" / "adapter_model.safetensors")


def test_the_reward_rises_and_the_numbers_fit_each_other(model: Path, folder: Path, tmp_path: Path) -> None:
    config = ppo_job(
        model,
        folder,
        tmp_path,
        "learns",
        data={"held_out": 0.1},
        train={"max_steps": 8 * STEPS_A_ROUND, "eval_steps": 4 * STEPS_A_ROUND, "logging_steps": STEPS_A_ROUND},
    )
    result, rows = run(config)
    rounds = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_reward" in row]
    assert [row["policy_version"] for row in rounds] == list(range(1, 9))
    assert all(row["staleness"] == 0 for row in rounds)
    # Engine and trainer compute the same, in fp32 to three digits at least, whatever the weights are by now.
    assert max(row["mismatch"] for row in rounds) < 1e-3
    assert max(row["probe_difference"] for row in rounds) < 1e-3
    first, last = rounds[0], rounds[-1]
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # before any step the policy is its reference
    assert last["kl"] > 0.1
    assert last["reward"] > first["reward"] + 0.3
    assert evaluations[-1]["eval_reward"] > first["reward"] + 0.3  # of prompts that were never learnt from
    assert result["examples"] == {"rows": 8 * 32}
    # What is learnt from are the tokens of answers, each in two epochs, and not those of prompts.
    assert result["trained_tokens"] == round(2 * 32 * sum(row["answer_tokens"] for row in rounds))
    assert result["engines"]["version"] == 8
    assert result["engine_breaks"] == []
    assert (config.run_dir / "model" / "value_head.safetensors").exists()
    assert all(name.startswith("base_model.") for name in policy(config))


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [0, 7])
def test_it_ends_with_its_last_epoch(model: Path, folder: Path, tmp_path: Path, left_out: int) -> None:
    """Two rounds and a half; behind them nothing, or rows that are too long."""
    texts = [f"word {n}?" for n in range(50)] + ["long " * 100] * left_out
    rows = [{"instruction": text, "output": "1"} for text in texts]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ppo_job(
        model,
        folder,
        tmp_path,
        "epoch",
        data={"train": [{"path": str(tmp_path / "some.jsonl")}], "manifest": True},
        stage={"prompts": 20, "epochs": 1},
        train={"batch_size": 10, "max_steps": None, "epochs": 1},
    )
    result, found = run(config)
    assert (result["status"], result["epochs_done"]) == ("finished", 1.0)
    assert result["examples"] == {"some": 50}
    assert sum(result["dropped"]["some"].values()) == left_out
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert (config.run_dir / "model" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_resumed_job_goes_on_where_it_stopped(model: Path, folder: Path, tmp_path: Path, staleness: int) -> None:
    parts: dict[str, Any] = {
        "rollout": {"max_staleness": staleness},
        "data": {"manifest": True},
        "stage": {"kl": {"coefficient": 0.1, "target": 0.5, "horizon": 100}},
    }
    whole = ppo_job(model, folder, tmp_path, "whole", **json.loads(json.dumps(parts)))
    _, rows = run(whole)
    short = {"train": {"max_steps": 2 * STEPS_A_ROUND}}
    run(ppo_job(model, folder, tmp_path, "parts", **json.loads(json.dumps(parts)), **short))
    resumed = ppo_job(model, folder, tmp_path, "parts", **json.loads(json.dumps(parts)), resume=True)
    run(resumed)
    # No prompt is lost and none is learnt from twice: every round has the prompts that it would have had.
    manifests = [(c.run_dir / "manifest.jsonl").read_text().splitlines() for c in (whole, resumed)]
    assert [json.loads(line)["examples"] for line in manifests[0]] == [
        json.loads(line)["examples"] for line in manifests[1]
    ]
    if staleness == 0:  # to the bit; with staleness too, where all that was asked ahead had been answered
        assert [row["loss"] for row in metrics(whole)] == [row["loss"] for row in metrics(resumed)]
        assert [row["kl_coefficient"] for row in rows] == [row["kl_coefficient"] for row in metrics(resumed)]
        for name, tensor in policy(whole).items():
            assert torch.equal(tensor, policy(resumed)[name]), name
    else:
        assert {row["staleness"] for row in rows[STEPS_A_ROUND:]} == {1.0}
        assert rows[0]["staleness"] == 0


@pytest.mark.slow
def test_an_engine_that_is_killed_is_started_again(model: Path, folder: Path, tmp_path: Path) -> None:
    """In the middle of the job; what is learnt is what would have been learnt without."""
    calm = ppo_job(model, folder, tmp_path, "calm")
    run(calm)
    config = ppo_job(model, folder, tmp_path, "killed")
    killed: list[int] = []

    def kill() -> None:
        import psutil

        while not killed:
            time.sleep(0.05)
            file = config.run_dir / "metrics.jsonl"
            if not file.exists() or len(file.read_text().splitlines()) < STEPS_A_ROUND:
                continue
            for process in psutil.process_iter(["name", "cmdline"]):
                if "ray::Engine" in " ".join(process.info["cmdline"] or [process.info["name"] or ""]):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result, rows = run(config)
    assert killed
    assert result["status"] == "finished"
    (event,) = result["engine_breaks"]
    assert "engine 0" in event["what"]
    assert 0 < event["seconds"] < 60
    assert result["engines"]["restarts"] == 1
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(calm)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("advantage", "parts"),
    [
        ("grpo", {}),
        ("dr_grpo", {"train": {"deepspeed": "zero2", "workers": 2, "batch_size": 8}}),
        ("rloo", {"train": {"deepspeed": "zero3", "workers": 2, "batch_size": 8}}),
        ("reinforce++", {"method": {"type": "full"}, "stage": {"reference": "copy"}, "train": {"learning_rate": 2e-3}}),
        ("gae", {"train": {"workers": 2, "batch_size": 8}}),
    ],
)
def test_other_advantages_learn_too(
    model: Path, folder: Path, tmp_path: Path, advantage: str, parts: dict[str, Any]
) -> None:
    stage = {"advantage": advantage, "prompts": 16, "samples": 4, **parts.get("stage", {})}
    if advantage != "gae":
        stage["value_learning_rate"] = None
    train = {"max_steps": 80, "logging_steps": 8, **parts.get("train", {})}
    config = ppo_job(model, folder, tmp_path, advantage.strip("+"), **{**parts, "stage": stage, "train": train})
    _, rows = run(config)
    assert max(row["mismatch"] for row in rows) < 1e-3
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_for_the_learning_rate(model: Path, folder: Path, tmp_path: Path) -> None:
    """Each trial has engines of its own; the reward of held-out prompts chooses, and the best trial is a whole run."""
    train = {"max_steps": 8 * STEPS_A_ROUND, "eval_steps": 4 * STEPS_A_ROUND}
    config = ppo_job(model, folder, tmp_path, "search", data={"held_out": 0.1}, train=train)
    space = {"train.learning_rate": "grid(5e-3, 1e-7)", "stage.kl.coefficient": "grid(0.05)"}
    search = {"metric": "eval_reward", "mode": "max", "searcher": "grid", "space": space}
    ledger = run_search(Document("job.yaml", {**config.model_dump(mode="json"), "search": search}))
    assert [trial["status"] for trial in ledger["trials"]] == ["finished"] * 2
    learns, stays = sorted(ledger["trials"], key=lambda trial: -trial["values"]["train.learning_rate"])
    assert learns["value"] > stays["value"] + 0.05
    assert ledger["best"] == learns["name"]
    best = Path(learns["run_dir"])
    evaluations = [json.loads(row) for row in (best / "metrics.jsonl").read_text().splitlines() if "eval_rew" in row]
    assert evaluations[-1]["eval_reward"] == learns["value"]
    assert json.loads((best / "result.json").read_text())["engines"]["restarts"] == 0
    assert read_job(tmp_path / "search" / "best.yaml").train.learning_rate == 5e-3
