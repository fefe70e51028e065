"""Judged answers (stage kto): losses equal a loop written without Rayloom, however the rows fall into batches."""

from __future__ import annotations

import json
import random
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

STEPS, ROWS, BETA = 4, 8, 0.5


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path, generator = tmp_path_factory.mktemp("judged") / "judged.jsonl", random.Random(1)
    words = "river stone lamp cloud seven garden window".split()
    rows = []
    for number in range(60):
        question, answer = (" ".join(generator.choices(words, k=generator.randint(1, 9))) for _ in range(2))
        good = generator.random() < 0.5
        turns = [{"role": "user", "content": f"{number}: {question}?"}]
        turns += [{"role": "assistant", "content": answer if good else answer + " no"}]
        rows.append({"messages": turns, "label": good})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(path), "format": "openai", "columns": {"messages": "messages", "kto_tag": "label"}}]


def plain_losses(config: JobConfig, tiny_model: Path) -> tuple[list[float], list[float]]:
    """The loss of each step and the divergence before it; prompts and other answers are put together here."""
    plan, encoder = prepare_data(config)
    options = segment_options(config)
    segments = list(islice(Walk(plan).segments(Position()), 8))
    rows = []
    for segment in segments:
        of_segment = [row for row in EncodeSegment(encoder, options)(plan, segment).to_pylist() if row["input_ids"]]
        stream = list(zip(segment.chunks.tolist(), segment.rows.tolist(), strict=True))
        kept = {row["rows"][0]: row for row in of_segment}
        order = [chunk << 32 | row for chunk, row in stream if chunk << 32 | row in kept]
        for row in of_segment:
            row["next"] = kept[order[(order.index(row["rows"][0]) + 1) % len(order)]]
        rows += of_segment

    def first(row: dict[str, Any]) -> tuple[list[int], list[int]]:
        border = row["position_ids"].index(0, 1)
        return row["input_ids"][:border], row["labels"][:border]

    torch.manual_seed(config.train.seed)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    torch.manual_seed(config.train.seed)
    model = attach_method(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config.method)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.train.learning_rate, weight_decay=0.0)

    def log_probability(of: Any, prompt: list[int], answer: list[int], learnt: list[int]) -> torch.Tensor:
        ids = [*prompt, *answer]
        scores = of(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        places = [len(prompt) + place for place, label in enumerate(learnt) if label >= 0]
        return sum((scores[place - 1, ids[place]] for place in places), torch.zeros(()))

    def ratio(prompt: list[int], answer: list[int], learnt: list[int]) -> torch.Tensor:
        with torch.no_grad():
            before = log_probability(reference, prompt, answer, learnt)
        return log_probability(model, prompt, answer, learnt) - before

    def parts(row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
        ids, labels = first(row)
        start = next(place for place, label in enumerate(labels) if label >= 0)
        return ids[:start], ids[start:], labels[start:]

    losses, divergences = [], []
    for step in range(STEPS):
        rate = learning_rate_factor((step + 0.5) / STEPS, config.train.scheduler, config.train.warmup)
        for group in optimizer.param_groups:
            group["lr"] = config.train.learning_rate * rate
        batch = rows[step * ROWS : (step + 1) * ROWS]
        with torch.no_grad():
            others = [ratio(parts(row)[0], *parts(row["next"])[1:]) for row in batch]
        z = max(0.0, float(sum(others) / len(others)))
        total = 0.0
        for row in batch:
            r = ratio(*parts(row))
            good, bad = 1 - torch.sigmoid(BETA * (r - z)), 1 - torch.sigmoid(BETA * (z - r))
            loss = (1.5 * good if row["desirable"] else bad) / ROWS
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        divergences.append(z)
    return losses, divergences


@pytest.mark.parametrize(
    "train",
    [
        {"batch_size": 4, "gradient_accumulation": 2},
        pytest.param({"batch_size": 2, "workers": 2, "global_batch_size": ROWS}, marks=pytest.mark.slow),
        pytest.param({"batch_size": 4, "workers": 2, "deepspeed": "zero3"}, marks=pytest.mark.slow),
    ],
    ids=["accumulated", "two", "zero3"],
)
def test_losses_equal_a_loop(
    train: dict[str, Any], tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    stage = {"type": "kto", "beta": BETA, "desirable_weight": 1.5}
    part = {"max_steps": STEPS, **train}
    config = job(tiny_model, tmp_path, sets, data={"held_out": 0.2}, stage=stage, train=part)
    result, rows = run(config)
    trained = [row for row in rows if "loss" in row]
    losses, divergences = plain_losses(config, tiny_model)
    assert [row["loss"] for row in trained] == pytest.approx(losses, abs=2e-5)
    assert [row["divergence"] for row in trained] == pytest.approx(divergences, abs=2e-4)
    assert max(divergences) > 0
    assert 0 < result["eval"]["eval_loss"] < 1.5  # a bad answer loses at most 1, a good one 1.5
    assert 0 <= result["eval"]["eval_accuracy"] <= 1
    assert result["eval"]["eval_divergence"] >= 0
