"""Batches of preferences, and what the model says of their answers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch.utils.checkpoint import checkpoint

from rayloom.losses.pairs import Pairs
from rayloom.train.batch import Batch, make_batch

_CHUNK = 1024
"""Positions whose logits stand in float32 at a time."""


def make_pair_batch(table: pa.Table, pad_token: int) -> Batch:
    """`rayloom.train.batch.make_batch` of twice as many rows: first all chosen answers, then all rejected ones.

    Args:
        table: token rows of two sequences each; the second begins where the position is 0 again.
    """
    sides: tuple[list[dict[str, list[int]]], ...] = ([], [])
    for number in range(table.num_rows):
        columns = {name: table[name][number].values for name in ("input_ids", "labels", "position_ids")}
        starts = np.flatnonzero(columns["position_ids"].to_numpy() == 0)
        if len(starts) < 2:  # of this row all was left out
            continue
        border = int(starts[1])
        for side, part in zip(sides, (slice(0, border), slice(border, None)), strict=True):
            side.append({name: values[part].to_pylist() for name, values in columns.items()})
    schema = pa.schema([table.schema.field(name) for name in ("input_ids", "labels", "position_ids")])
    return make_batch(pa.Table.from_pylist([*sides[0], *sides[1]], schema=schema), pad_token)


def answer_sums(logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """The summed log-probability of each row's labels, (count,), in float32.

    Never more than some thousand positions' logits are in float32 at a time, in the backward pass too.

    Args:
        logits: (kept, vocabulary) at the trained positions.
        labels: (kept,); -100 counts nothing.
        rows: (kept,) which row each position is of.
    """
    sums = torch.zeros(count, dtype=torch.float32, device=logits.device)
    for start in range(0, len(labels), _CHUNK):
        part = slice(start, start + _CHUNK)
        found = checkpoint(_log_probabilities, logits[part], labels[part], use_reentrant=False)
        sums = sums.index_add(0, rows[part], found)
    return sums


def _log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def pairs_of(policy: torch.Tensor, reference: torch.Tensor | None, labels: torch.Tensor, rows: torch.Tensor) -> Pairs:
    """From the sums of all rows, chosen first: (2 pairs,) each, the reference's perhaps None."""
    tokens = torch.zeros_like(policy).index_add_(0, rows, (labels >= 0).to(policy.dtype)).clamp(min=1)
    chosen, rejected = policy.chunk(2)
    of_chosen, of_rejected = tokens.chunk(2)
    if reference is None:
        return Pairs(chosen, rejected, of_chosen, of_rejected)
    return Pairs(chosen, rejected, of_chosen, of_rejected, *reference.chunk(2))
