"""Pipelines on Ray: steps begin at what those before have trained, finished ones are skipped, a killed one goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.ray.small_jobs import write_rows
from transformers import AutoModelForCausalLM

from rayloom.config.document import dump_document
from rayloom.errors import RequestError
from rayloom.pipeline.read import read_pipeline
from rayloom.pipeline.run import run_pipeline

pytestmark = [pytest.mark.usefixtures("connected"), pytest.mark.timeout(600)]

LEARNING_RATE = "steps[1].train.learning_rate=2e-3"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "rows.jsonl", 60)
    pairs = [{"instruction": f"Say {i}.", "output": [f"It is {i}, I say.", "No."]} for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def write(model: Path, data: Path, output: Path, *more: dict[str, Any], **dpo: Any) -> Path:
    """A pipeline of sft and dpo on a tiny model, in fp32 on CPU; `more`: further steps."""
    pairs = {"train": [{"path": str(data / "pairs.jsonl"), "ranking": True}]}
    train = {"device": "cpu", "precision": "fp32", "logging_steps": 1, "batch_size": 2, "max_steps": 4}
    document = {
        "name": "chain",
        "output_dir": str(output),
        "model": {"path": str(model)},
        "data": {"cutoff": 128, "window": 16},
        "train": {**train, "learning_rate": 1e-2},
        "steps": [
            {"name": "sft", "method": {"rank": 4}, "data": {"train": [str(data / "rows.jsonl")]}},
            {
                "name": "dpo",
                "from": "sft",
                "data": pairs,
                "stage": {"type": "dpo", "reference": "cached"},
                "train": {"learning_rate": 1e-3, **dpo},
            },
            *more,
        ],
    }
    output.mkdir(exist_ok=True)
    (output / "chain.yaml").write_text(dump_document(document))
    return output / "chain.yaml"


def run(file: Path, *overrides: str) -> dict[str, Any]:
    return run_pipeline(read_pipeline(file, overrides), started=time.time())


def rows_of(step: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(step["run_dir"]) / "metrics.jsonl").read_text().splitlines()]


def adapter_of(step: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(step["run_dir"]) / "model" / "adapter_model.safetensors")


def test_steps_run_once_and_a_changed_one_again(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    file = write(tiny_model, data, tmp_path)
    result = run(file)
    assert (result["status"], result["steps"]) == ("finished", 8)
    sft, dpo = result["pipeline"]
    assert [sft["skipped"], dpo["skipped"]] == [False, False]
    # The second step begins at the first one's adapter, which is its reference: the loss is that of no difference.
    assert rows_of(dpo)[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    first, second = adapter_of(sft), adapter_of(dpo)
    assert first.keys() == second.keys()
    assert all(first[name].shape == second[name].shape for name in first)
    moved = max((first[name] - second[name]).abs().max().item() for name in first)
    assert 0 < moved < 0.05, "a few small steps away, not an adapter of its own"
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), result["model_dir"])
    assert json.loads((tmp_path / "chain" / "result.json").read_text()) == result

    again = run(file)
    assert [step["skipped"] for step in again["pipeline"]] == [True, True]
    assert (again["steps"], again["model_dir"]) == (8, result["model_dir"])

    changed = run(file, LEARNING_RATE)
    assert [step["skipped"] for step in changed["pipeline"]] == [True, False]
    assert changed["model_dir"] != result["model_dir"]
    assert rows_of(changed["pipeline"][1])[1]["loss"] != rows_of(dpo)[1]["loss"]
    assert Path(result["model_dir"]).exists(), "what the step was before stays"
    assert [step["skipped"] for step in run(file)["pipeline"]] == [True, True]


@pytest.mark.slow
def test_a_killed_step_goes_on(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    slow = {"max_steps": 40, "save_steps": 5, "batch_size": 8, "gradient_accumulation": 6}
    file = write(tiny_model, data, tmp_path, **slow)
    process = subprocess.Popen([sys.executable, "-m", "rayloom", "train", str(file)], cwd=tmp_path)
    until = time.monotonic() + 300
    while not any('"step": 20,' in path.read_text() for path in tmp_path.glob("chain/dpo-*/metrics.jsonl")):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.wait()
    with pytest.raises(RequestError, match=r"step dpo: output_dir: .* holds an unfinished run .*resume=true goes on"):
        run(file)
    result = run(file, "resume=true")
    sft, dpo = result["pipeline"]
    assert (sft["skipped"], dpo["skipped"], dpo["status"]) == (True, False, "finished")
    assert [row["step"] for row in rows_of(dpo)] == list(range(1, 41))
    positions = [row["position"] for row in rows_of(dpo)]
    assert len({json.dumps(position) for position in positions}) > 20, "the stream goes on, it does not begin anew"
    # Killed when all was trained and nothing was written of it yet.
    (Path(dpo["run_dir"]) / "result.json").unlink()
    last = run(file, "resume=true")
    assert (last["status"], last["pipeline"][1]["steps"]) == ("finished", 40)


@pytest.mark.slow
def test_a_new_adapter_and_a_step_after_it(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """The first adapter is merged below a second one, and the merged model is one that a third step begins at."""
    pairs = {"train": [{"path": str(data / "pairs.jsonl"), "ranking": True}]}
    last = {"name": "last", "from": "dpo", "data": pairs, "stage": {"type": "dpo", "reference": "cached"}}
    file = write(tiny_model, data, tmp_path, last)
    result = run(file, "steps[1].method={rank: 2, new_adapter: true}", "steps[1].stage={type: dpo}")
    sft, dpo, last_step = result["pipeline"]
    assert result["status"] == "finished"
    assert rows_of(last_step)[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    base = AutoModelForCausalLM.from_pretrained(Path(dpo["run_dir"]) / "model" / "base", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(plain, Path(sft["run_dir"]) / "model").merge_and_unload()
    ids = torch.arange(5, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(base(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4)


@pytest.mark.slow
def test_a_policy_that_a_step_has_trained_and_a_step_judges(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    pairs = {"train": [{"path": str(data / "pairs.jsonl"), "ranking": True}]}
    reward = {"name": "reward", "data": pairs, "stage": {"type": "reward"}, "method": {"rank": 2}}
    ppo = {
        "name": "ppo",
        "from": "sft",
        "data": {"train": [str(data / "rows.jsonl")]},
        "stage": {"type": "ppo", "prompts": 4, "epochs": 1, "reference": "copy"},
        "rewards": {"sources": [{"type": "adapter", "from": "reward"}]},
        "rollout": {"max_tokens": 8, "kv_cache_gib": 0.25},
    }
    result = run(write(tiny_model, data, tmp_path, reward, ppo))
    sft, _, _, last = result["pipeline"]
    assert result["status"] == "finished"
    rounds = rows_of(last)
    assert rounds[0]["kl"] == pytest.approx(0, abs=1e-5), "the policy begins at its reference, the first step's model"
    assert max(row["mismatch"] for row in rounds) < 1e-3, "the engines serve the first step's adapter"
    first, policy = adapter_of(sft), adapter_of(last)
    assert max((first[name] - policy[name]).abs().max().item() for name in first) < 0.1
