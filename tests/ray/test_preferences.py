"""Preference training: losses equal a loop written without Rayloom, on one worker and on two."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ray.small_jobs import job, run
from transformers import AutoModelForCausalLM

from rayloom.config.job import JobConfig
from rayloom.data.plan import Position
from rayloom.data.segment import EncodeSegment
from rayloom.data.walk import Walk
from rayloom.methods.attach import attach_method
from rayloom.stages.prepare import prepare_data, segment_options
from rayloom.train.schedule import learning_rate_factor

pytestmark = pytest.mark.usefixtures("connected")

STEPS, BATCH = 4, 4
Ids = list[int]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path, generator = tmp_path_factory.mktemp("pairs") / "pairs.jsonl", random.Random(1)
    words = "river stone lamp cloud seven garden window".split()

    def text(most: int) -> str:
        return " ".join(generator.choices(words, k=generator.randint(1, most)))

    rows = [{"instruction": f"{n}: {text(8)}?", "output": [text(9), text(9) + " no"]} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(path), "ranking": True}]


def pairs_job(
    model: Path, folder: Path, sets: list[dict[str, Any]], stage: dict[str, Any], method: str = "lora", **train: Any
) -> JobConfig:
    part = {"max_steps": STEPS, "batch_size": BATCH, **train}
    stage = {"type": "dpo", **stage}
    return job(model, folder, sets, data={"held_out": 0.2}, stage=stage, method={"type": method}, train=part)


def ls(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.logsigmoid(x)


class Shifted:
    """`bco_pair`: rewards less the mean of all rewards of the steps before."""

    def __init__(self) -> None:
        self.before: list[float] = []
        self.now: list[float] = []

    def __call__(self, w: torch.Tensor, v: torch.Tensor, a: Any, c: Any, m: int, n: int) -> torch.Tensor:
        shift = sum(self.before) / len(self.before) if self.before else 0.0
        r, q = 0.5 * (w - a), 0.5 * (v - c)
        self.now += [r.item(), q.item()]
        if len(self.now) == 2 * BATCH:
            self.before, self.now = self.before + self.now, []
        return -ls(r - shift) - ls(shift - q)


# w, v: log-probabilities of the chosen and the rejected answer; a, c: the reference's; m, n: tokens.
LOSSES: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "sigmoid": ({}, lambda w, v, a, c, m, n: -ls(0.1 * (w - a - v + c))),
    "smoothed": (
        {"label_smoothing": 0.2, "ftx": 0.5},
        lambda w, v, a, c, m, n: -0.8 * ls(0.1 * (w - a - v + c)) - 0.2 * ls(-0.1 * (w - a - v + c)) - 0.5 * w / m,
    ),
    "ipo": ({"loss": "ipo"}, lambda w, v, a, c, m, n: ((w - a) / m - (v - c) / n - 5) ** 2),
    "full": ({"reference": "copy"}, lambda w, v, a, c, m, n: -ls(0.1 * (w - a - v + c))),
    "bco": ({"loss": "bco_pair", "beta": 0.5}, Shifted()),
    "simpo": ({"loss": "simpo", "beta": 2.0}, lambda w, v, a, c, m, n: -ls(2 * (w / m - v / n) - 0.5)),
}


def plain_losses(config: JobConfig, tiny_model: Path, of_pair: Callable[..., Any]) -> tuple[list[float], list[float]]:
    """The loss of each step, and the share of pairs whose chosen answer has gained more."""
    plan, encoder = prepare_data(config)
    encode = EncodeSegment(encoder, segment_options(config))
    rows = [row for segment in islice(Walk(plan).segments(Position()), 8) for row in encode(plan, segment).to_pylist()]
    rows = [row for row in rows if row["input_ids"]]
    torch.manual_seed(config.train.seed)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    torch.manual_seed(config.train.seed)
    model = attach_method(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config.method)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.train.learning_rate, weight_decay=0.0)
    losses, accuracies = [], []

    def log_probability(of: Any, ids: Ids, labels: Ids) -> tuple[torch.Tensor, int]:
        scores = of(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        places = [place for place, label in enumerate(labels) if label >= 0]
        return sum((scores[place - 1, ids[place]] for place in places), torch.zeros(())), len(places)

    for step in range(STEPS):
        rate = learning_rate_factor((step + 0.5) / STEPS, config.train.scheduler, config.train.warmup)
        for group in optimizer.param_groups:
            group["lr"] = config.train.learning_rate * rate
        total, better = 0.0, 0
        for row in rows[step * BATCH : (step + 1) * BATCH]:
            border = row["position_ids"].index(0, 1)
            sides = [(row["input_ids"][part], row["labels"][part]) for part in (slice(border), slice(border, None))]
            (w, m), (v, n) = (log_probability(model, *side) for side in sides)
            with torch.no_grad():
                (a, _), (c, _) = (log_probability(reference, *side) for side in sides)
            loss = of_pair(w, v, a, c, m, n) / BATCH
            loss.backward()
            total += loss.item()
            better += int(w - a > v - c)
        torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        accuracies.append(better / BATCH)
    return losses, accuracies


@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("sigmoid", {}),
        pytest.param("smoothed", {"batch_size": 1, "workers": 2, "global_batch_size": BATCH}, marks=pytest.mark.slow),
        pytest.param("ipo", {"batch_size": 2, "workers": 2, "deepspeed": "zero2"}, marks=pytest.mark.slow),
        pytest.param("sigmoid", {"batch_size": 2, "workers": 2, "deepspeed": "zero3"}, marks=pytest.mark.slow),
        pytest.param("simpo", {"activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("bco", {"batch_size": 1, "workers": 2, "global_batch_size": BATCH}, marks=pytest.mark.slow),
        pytest.param("full", {"batch_size": 2, "workers": 2}, marks=pytest.mark.slow),
        pytest.param("full", {"batch_size": 2, "workers": 2, "deepspeed": "zero2"}, marks=pytest.mark.slow),
    ],
)
def test_losses_equal_a_loop(
    name: str, train: dict[str, Any], tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    stage, of_pair = LOSSES[name]
    config = pairs_job(tiny_model, tmp_path, sets, stage, "full" if name == "full" else "lora", **train)
    result, rows = run(config)
    trained = [row for row in rows if "loss" in row]
    losses, accuracies = plain_losses(config, tiny_model, of_pair)
    assert [row["loss"] for row in trained] == pytest.approx(losses, abs=2e-5)
    if name == "sigmoid":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are one before the first step
        assert [row["accuracy"] for row in trained[1:]] == accuracies[1:]
        assert all(
            row["rewards/margin"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6)
            for row in trained
        )
        assert 0 <= result["eval"]["eval_accuracy"] <= 1
        assert result["eval"]["eval_rewards/margin"] > 0  # rejected answers all end alike
