"""From token rows to what a causal model is called with, and to no more logits than the loss needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rayloom.data.pack import split_evenly
from rayloom.data.rows import IGNORED, collate

Batch = dict[str, Any]
"""Tensors by name; of some stages also a batch within the batch."""


ROW = 2048
"""About as many tokens a row of several examples has, or as many as the longest one: a mask is a row's length
squared."""
_LISTS = ("input_ids", "labels", "position_ids")


def make_batch(table: pa.Table, pad_token: int, side_by_side: int | None = None) -> Batch:
    """The rows of `table`, padded: `input_ids`, `position_ids` (batch, length), and of the rest only what is trained.

    Where no row is packed there are no `position_ids`: a model knows its own, and those of some do not begin at 0
    (RoBERTa's) or are no argument of theirs.

    The output layer and the softmax over the vocabulary are a large part of a small model's work and of any model's
    memory; at a position whose next token has no label they compute what the loss throws away. So a batch says where
    its trained tokens are: `positions` (kept,), numbers into the flattened (batch * length); `shift_labels` and
    `labels` (1, kept), the token that each of them must predict. `labels` is there because models compute a loss only
    where they are given some. `TrainedPositions` makes a model follow. The loss is the same sum.

    Args:
        side_by_side: where no row is packed, put them together into so many rows of nearly the same length, or a
            multiple of it, with hardly any padding; None: each stays by itself.
    """
    if side_by_side is not None and not _is_packed(table):
        table = _joined(table, side_by_side)
    batch = {name: torch.from_numpy(array) for name, array in collate(table, pad_token).items()}
    if not _is_packed(table):
        del batch["position_ids"]
    targets = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED).flatten()
    positions = (targets != IGNORED).nonzero().squeeze(-1)
    if len(positions) == 0:  # nothing is trained; one logit keeps the graph whole
        positions = torch.zeros(1, dtype=torch.long)
    kept = targets[positions].unsqueeze(0)
    return {**batch, "labels": kept, "shift_labels": kept, "positions": positions}


def _is_packed(table: pa.Table) -> bool:
    """Whether a row holds more than one example."""
    return any(np.count_nonzero(positions.values.to_numpy() == 0) > 1 for positions in table["position_ids"])


def shared_rows(lengths: Sequence[int], side_by_side: int = 1) -> list[list[int]]:
    """Which sequences share a row, so that rows are of nearly one length.

    Args:
        lengths: of the sequences, in tokens; at least one.
        side_by_side: there is a multiple of so many rows, where there are as many sequences.
    """
    rows = side_by_side * max(1, -(-sum(lengths) // (side_by_side * ROW)))
    return split_evenly(lengths, min(rows, len(lengths)))


def _joined(table: pa.Table, side_by_side: int) -> pa.Table:
    """The tokens of a table's rows in fewer rows."""
    if table.num_rows < 2:
        return table
    columns = {name: [row.values.to_numpy() for row in table[name]] for name in _LISTS}
    groups = shared_rows([len(ids) for ids in columns["input_ids"]], side_by_side)
    joined = {name: [np.concatenate([rows[n] for n in group]) for group in groups] for name, rows in columns.items()}
    return pa.table(joined, schema=pa.schema([table.schema.field(name) for name in _LISTS]))


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What a model is called with."""
    names = ("input_ids", "position_ids") if "position_ids" in batch else ("input_ids",)
    return {"use_cache": False} | {name: batch[name] for name in names}


class TrainedPositions:
    """Lets a causal model's output layer see the hidden states at chosen positions only.

    A forward hook on the output layer, and not the models' own argument `logits_to_keep`, which chooses the same
    columns for all rows of a batch: in packed rows these are nearly all. What a model does to its logits afterwards
    (a scale, a soft cap) it does to each by itself, so it still holds.

    Args:
        skip: hidden states at the start of each row that are not of its own tokens, but of a method's virtual ones.
    """

    def __init__(self, model: Any, skip: int = 0) -> None:
        self._skip = skip
        self._chosen = _Chosen()
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(self._choose)
        self._logits, head.forward = head.forward, self._logits_or_none

    def choose(
        self,
        positions: torch.Tensor | None,
        *,
        adapted: bool = True,
        take: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """Positions (kept,) of this thread's next forward pass, in the flattened (batch * length); None: all of them.

        Args:
            adapted: whether the method's virtual tokens are there, and not switched off.
            take: gets the hidden states (kept, size), once; then the model's logits are (1, kept, 0).
        """
        self._chosen.positions, self._chosen.take = positions, take
        self._chosen.ahead = self._skip if adapted else 0

    def _choose(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        chosen = self._chosen
        if chosen.positions is None:
            return None
        hidden = inputs[0][:, chosen.ahead :].flatten(0, 1)[chosen.positions]
        return (hidden.unsqueeze(0), *inputs[1:])

    def _logits_or_none(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In the place of the output layer's forward pass, so that hooks behind it see its inputs either way."""
        take, self._chosen.take = self._chosen.take, None
        if take is None:
            logits: torch.Tensor = self._logits(hidden, *args, **kwargs)
            return logits
        self._chosen.positions = None
        take(hidden[0])
        return hidden[..., :0]


class _Chosen(threading.local):
    """What was chosen last, of each thread by itself: rows may go through a model side by side."""

    positions: torch.Tensor | None = None
    take: Callable[[torch.Tensor], None] | None = None
    ahead: int = 0
