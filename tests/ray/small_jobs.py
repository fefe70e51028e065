"""Small jobs for the tests of this folder, and what their numbers should be."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.config.read import validate_job
from rayloom.train.driver import run_job
from rayloom.train.schedule import learning_rate_factor

_WORDS = "river stone lamp cloud seven garden window quiet paper winter bridge candle music orange silver".split()


def write_rows(path: Path, rows: int, seed: int = 0) -> Path:
    """An alpaca file of `rows` distinct rows of varied length."""
    generator = random.Random(seed)
    with path.open("w") as file:
        for number in range(rows):
            question = " ".join(generator.choices(_WORDS, k=generator.randint(2, 10)))
            answer = " ".join(generator.choices(_WORDS, k=generator.randint(1, 12)))
            file.write(json.dumps({"instruction": f"{path.stem} {number}: {question}?", "output": answer}) + "\n")
    return path


def two_sets(folder: Path) -> list[dict[str, Any]]:
    """30 rows and 60 rows, with weights 1 and 3."""
    return [
        {"path": str(write_rows(folder / "short.jsonl", 30, seed=1)), "weight": 1},
        {"path": str(write_rows(folder / "long.jsonl", 60, seed=2)), "weight": 3},
    ]


def job(model: Path, output: Path, sets: list[dict[str, Any]], name: str = "run", **parts: Any) -> JobConfig:
    """A job in fp32 on one CPU worker that logs every step; `parts` (`train={...}`) are merged in."""
    document: dict[str, Any] = {
        "name": name,
        "output_dir": str(output),
        "model": {"path": str(model)},
        "data": {"train": sets, "cutoff": 128, "window": 16},
        "train": {"device": "cpu", "precision": "fp32", "logging_steps": 1, "learning_rate": 1e-2, "batch_size": 2},
    }
    for key, value in parts.items():
        document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    return validate_job(Document("test", document))


def run(config: JobConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a job here; return `result.json` and the rows of `metrics.jsonl`."""
    result = run_job(config, started=time.time())
    return result, metrics(config)


def metrics(config: JobConfig) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`."""
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def cross_entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each token."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def plain_losses(
    model: Any,
    steps: list[list[tuple[list[int], list[int]]]],
    config: JobConfig,
    of_tokens: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropies,
) -> list[float]:
    """Losses of a loop written without Rayloom, Ray, DeepSpeed or packing: every example is a batch of its own.

    Args:
        steps: for each optimizer step its examples as (input_ids, labels).
        of_tokens: (logits, labels) of an example -> the loss of each of its tokens.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train = config.train
    optimizer = torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    losses = []
    for number, examples in enumerate(steps):
        trained = sum(label >= 0 for _, labels in examples for label in labels[1:])
        progress = (number + 0.5) / len(steps)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate * learning_rate_factor(progress, train.scheduler, train.warmup)
        total = 0.0
        for input_ids, labels in examples:
            logits = model(torch.tensor([input_ids]), use_cache=False).logits[0, :-1].float()
            learnt = torch.tensor(labels[1:]) >= 0
            loss = of_tokens(logits[learnt], torch.tensor(labels[1:])[learnt]).sum() / trained
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
