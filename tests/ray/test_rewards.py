"""Reward models: losses equal a loop written without Rayloom, the head is saved beside the model, a run goes on."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.ray.small_jobs import job, metrics, run
from transformers import AutoModelForCausalLM

from rayloom.config.job import JobConfig
from rayloom.data.plan import Position
from rayloom.data.segment import EncodeSegment
from rayloom.data.walk import Walk
from rayloom.methods.attach import attach_method
from rayloom.models.value_head import ValueHead
from rayloom.stages.prepare import eval_options, prepare_data, prepare_eval, segment_options
from rayloom.train.schedule import learning_rate_factor

pytestmark = pytest.mark.usefixtures("connected")

STEPS, BATCH = 4, 4


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    generator, folder = random.Random(1), tmp_path_factory.mktemp("pairs")
    words = "river stone lamp cloud seven garden window".split()

    def text(most: int) -> str:
        return " ".join(generator.choices(words, k=generator.randint(1, most)))

    for name, end in (("short", " no"), ("long", " no no")):
        rows = [{"instruction": f"{name} {n}: {text(8)}?", "output": [text(9), text(9) + end]} for n in range(30)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(folder / f"{name}.jsonl"), "ranking": True} for name in ("short", "long")]


def reward_job(model: Path, folder: Path, sets: list[dict[str, Any]], **parts: Any) -> JobConfig:
    train = {"max_steps": STEPS, "batch_size": BATCH, **parts.pop("train", {})}
    stage = {"type": "reward", "center": 0.1, "head_learning_rate": 5e-2}
    return job(model, folder, sets, data={"held_out": 0.2}, stage=stage, train=train, **parts)


def sequences(row: dict[str, Any]) -> list[torch.Tensor]:
    border = row["position_ids"].index(0, 1)
    return [torch.tensor([row["input_ids"][part]]) for part in (slice(border), slice(border, None))]


def plain_losses(config: JobConfig, tiny_model: Path) -> list[float]:
    plan, encoder = prepare_data(config)
    encode = EncodeSegment(encoder, segment_options(config))
    rows = [row for segment in islice(Walk(plan).segments(Position()), 8) for row in encode(plan, segment).to_pylist()]
    rows = [row for row in rows if row["input_ids"]]
    torch.manual_seed(config.train.seed)
    model = attach_method(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config.method)
    head = ValueHead(model.config.hidden_size)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates = [config.train.learning_rate, config.stage.head_learning_rate]  # type: ignore[union-attr]
    groups = [{"params": parameters}, {"params": [*head.parameters()]}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * learning_rate_factor((step + 0.5) / STEPS, config.train.scheduler, config.train.warmup)
        total = 0.0
        for row in rows[step * BATCH : (step + 1) * BATCH]:
            w, v = (head(model(ids, output_hidden_states=True).hidden_states[-1])[0, -1] for ids in sequences(row))
            loss = (-torch.nn.functional.logsigmoid(w - v) + 0.1 * (w + v) ** 2) / BATCH
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_([*parameters, *head.parameters()], config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    "train",
    [
        {},
        pytest.param({"batch_size": 1, "workers": 2, "global_batch_size": BATCH}, marks=pytest.mark.slow),
        pytest.param({"batch_size": 2, "workers": 2, "deepspeed": "zero2"}, marks=pytest.mark.slow),
        pytest.param({"batch_size": 2, "workers": 2, "deepspeed": "zero3"}, marks=pytest.mark.slow),
    ],
    ids=["one", "accumulated", "zero2", "zero3"],
)
def test_losses_equal_a_loop(
    train: dict[str, Any], tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = reward_job(tiny_model, tmp_path, sets, train=train)
    result, rows = run(config)
    trained = [row for row in rows if "loss" in row]
    assert [row["loss"] for row in trained] == pytest.approx(plain_losses(config, tiny_model), abs=2e-5)
    assert result["eval"]["eval_accuracy"] > 0.8  # rejected answers all end alike
    check_what_is_saved(config, tiny_model, result["eval"])


def check_what_is_saved(config: JobConfig, tiny_model: Path, found: dict[str, float]) -> None:
    """The adapter and the head, loaded by PEFT and by hand, give the evaluation's numbers."""
    folder = config.run_dir / "model"
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    head = load_file(folder / "value_head.safetensors")
    weight, bias = head["v_head.summary.weight"], head["v_head.summary.bias"]
    assert not any("v_head" in name for name in load_file(folder / "adapter_model.safetensors"))
    plan = prepare_eval(config)
    assert plan is not None
    _, encoder = prepare_data(config)
    encode, means = EncodeSegment(encoder, eval_options(config)), {}
    for segment in islice(Walk(plan).segments(Position()), 8):
        for row in encode(plan, segment).to_pylist():
            if row["input_ids"] and row["epoch"] == 0:
                with torch.no_grad():
                    states = [model(ids, output_hidden_states=True).hidden_states[-1][0, -1] for ids in sequences(row)]
                means[row["sets"][0], row["rows"][0]] = [float(weight[0] @ state + bias) for state in states]
    for name, sets in (("", {0, 1}), ("/short", {0}), ("/long", {1})):
        chosen = [pair[0] for (number, _), pair in means.items() if number in sets]
        margins = [pair[0] - pair[1] for (number, _), pair in means.items() if number in sets]
        assert found[f"eval_rewards/chosen{name}"] == pytest.approx(sum(chosen) / len(chosen), abs=1e-4)
        assert found[f"eval_rewards/margin{name}"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_goes_on(method: str, tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    """Two steps and two more are the four of one run, the head's included."""
    parts: dict[str, Any] = {"method": {"type": method}, "train": {"scheduler": "constant", "warmup": 0.0}}
    whole = reward_job(tiny_model, tmp_path, sets, name="whole", **parts)
    run(whole)
    parts["train"]["max_steps"] = 2
    run(reward_job(tiny_model, tmp_path, sets, name="parts", **parts))
    parts["train"]["max_steps"] = 4
    run(going_on := reward_job(tiny_model, tmp_path, sets, name="parts", resume=True, **parts))
    losses = [[row["loss"] for row in metrics(config) if "loss" in row] for config in (whole, going_on)]
    assert losses[0] == losses[1]
    heads = [load_file(config.run_dir / "model" / "value_head.safetensors") for config in (whole, going_on)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    if method == "full":  # it loads as a language model, without the head
        _, info = AutoModelForCausalLM.from_pretrained(whole.run_dir / "model", output_loading_info=True)
        assert not info["unexpected_keys"]
