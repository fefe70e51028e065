"""Evaluation on rows that are not trained on: per trained token the loss, and whether it was the likeliest.

Every rank runs its own rows; sums of losses, hits and tokens are added up. Logits of one batch are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import torch

from rayloom.data.rows import IGNORED
from rayloom.train.batch import TrainedPositions, make_batch


def evaluate(
    model: Any,
    tables: Iterable[pa.Table],
    names: Sequence[str],
    trained_positions: TrainedPositions,
    pad_token: int,
    device: torch.device,
) -> dict[str, float]:
    """`eval_loss` (cross-entropy), `eval_perplexity`, `eval_accuracy` (share of the tokens that the model holds for the
    likeliest); where there are several sets also `eval_loss/<set>` and so on, of each one that has a trained token.

    Args:
        tables: this rank's batches, one example a row; every rank has as many.
        names: of the sets, in the order of their numbers.
    """
    sums = torch.zeros(3, len(names), dtype=torch.float64, device=device)  # of losses, hits, tokens
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for table in tables:
            _add(sums, model, table, trained_positions, pad_token, device)
    model.train(was_training)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    sums = sums.cpu()
    metrics = _means(sums.sum(1))
    if len(names) > 1:
        for of_set, name in zip(sums.T, names, strict=True):
            if of_set[2]:
                metrics |= {f"{metric}/{name}": mean for metric, mean in _means(of_set).items()}
    return metrics


def _means(sums: torch.Tensor) -> dict[str, float]:
    """What sums of losses, hits and tokens come to."""
    loss, accuracy = (sums[:2] / sums[2]).tolist()
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0)), "eval_accuracy": accuracy}


def _add(
    sums: torch.Tensor,
    model: Any,
    table: pa.Table,
    trained_positions: TrainedPositions,
    pad_token: int,
    device: torch.device,
) -> None:
    batch = {name: tensor.to(device) for name, tensor in make_batch(table, pad_token).items()}
    positions, labels = batch.pop("positions"), batch.pop("labels")[0]
    del batch["shift_labels"]  # without labels the model computes no loss of its own
    trained_positions.choose(positions)
    logits = model(**batch, use_cache=False).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED).double()
    set_of_row = torch.tensor([sets[0] if sets else 0 for sets in table["sets"].to_pylist()] or [0], device=device)
    set_of_token = set_of_row[positions // batch["input_ids"].shape[1]]
    sums[0].index_add_(0, set_of_token, losses)
    sums[1].index_add_(0, set_of_token, (logits.argmax(-1) == labels).double())
    sums[2].index_add_(0, set_of_token, (labels != IGNORED).double())
