"""Batches of preferences, and what the model says of their answers."""

from __future__ import annotations

import pyarrow as pa
import torch

from rayloom.data.rows import second_start
from rayloom.losses.pairs import Pairs
from rayloom.train.batch import Batch, make_batch
from rayloom.train.token_scores import TokenScores

_COLUMNS = ("input_ids", "labels", "position_ids")


def make_pair_batch(table: pa.Table, pad_token: int) -> Batch:
    """`rayloom.train.batch.make_batch` of twice as many rows: first all chosen answers, then all rejected ones.

    Args:
        table: token rows of two sequences each; the second begins where the position is 0 again.
    """
    chosen, rejected = sides_of(table)
    return make_batch(pa.concat_tables([chosen, rejected]), pad_token)


def make_reward_batch(table: pa.Table, pad_token: int) -> Batch:
    """The same with one position a row, its last token's: there an answer's reward is read. Labels mean nothing."""
    rows = pa.concat_tables(sides_of(table))
    batch = make_batch(rows, pad_token)
    shape = batch["input_ids"].shape
    lengths = torch.tensor([len(ids) for ids in rows["input_ids"]] or [1])
    batch["positions"] = torch.arange(shape[0]) * shape[1] + lengths - 1
    batch["labels"] = batch["shift_labels"] = torch.zeros(1, shape[0], dtype=torch.long)
    return batch


def first_sequences(table: pa.Table) -> pa.Table:
    """Of each row that has any, the first sequence: all of it where there is no second."""
    rows = []
    for number in range(table.num_rows):
        columns = {name: table[name][number].values for name in _COLUMNS}
        if len(columns["input_ids"]):
            end = second_start(columns["position_ids"].to_numpy()) or None
            rows.append({name: values[:end].to_pylist() for name, values in columns.items()})
    return pa.Table.from_pylist(rows, schema=pa.schema([table.schema.field(name) for name in _COLUMNS]))


def second_starts(table: pa.Table) -> list[int]:
    """Of each row where its second sequence begins; 0: it has none."""
    return [second_start(positions.values.to_numpy()) for positions in table["position_ids"]]


def sides_of(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The first and the second sequences of a table's rows. A row that has not two, all was left out of it, is in
    neither."""
    sides: tuple[list[dict[str, list[int]]], ...] = ([], [])
    for number, border in enumerate(second_starts(table)):
        if not border:
            continue
        columns = {name: table[name][number].values for name in _COLUMNS}
        for side, part in zip(sides, (slice(0, border), slice(border, None)), strict=True):
            side.append({name: values[part].to_pylist() for name, values in columns.items()})
    schema = pa.schema([table.schema.field(name) for name in _COLUMNS])
    first, second = (pa.Table.from_pylist(side, schema=schema) for side in sides)
    return first, second


def answer_sums(said: TokenScores, batch: Batch, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The summed log-probability of each row's labels, (rows,), in float32.

    Args:
        said: of the batch's labels; of -100 it counts nothing.
        batch: as `make_batch` gives it.
        weights: (kept,) what each log-probability counts; None: 1.
    """
    rows, length = batch["input_ids"].shape
    counted = said.log_probs if weights is None else weights * said.log_probs
    return counted.new_zeros(rows).index_add(0, batch["positions"] // length, counted)


def pairs_of(policy: torch.Tensor, reference: torch.Tensor | None, labels: torch.Tensor, rows: torch.Tensor) -> Pairs:
    """From the sums of all rows, chosen first: (2 pairs,) each, the reference's perhaps None."""
    tokens = torch.zeros_like(policy).index_add_(0, rows, (labels >= 0).to(policy.dtype)).clamp(min=1)
    chosen, rejected = policy.chunk(2)
    of_chosen, of_rejected = tokens.chunk(2)
    if reference is None:
        return Pairs(chosen, rejected, of_chosen, of_rejected)
    return Pairs(chosen, rejected, of_chosen, of_rejected, *reference.chunk(2))
