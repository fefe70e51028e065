"""Answers of a round on the rank that learns from them, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rayloom.data.encoding import IGNORED
from rayloom.rollout.request import Rollout
from rayloom.train.batch import Batch


@dataclass(frozen=True)
class Asked:
    """A prompt of the stream."""

    number: int
    """Among all prompts of the round, of all ranks, in stream order."""
    set: int
    row: int
    """`rayloom.data.rows.row_id`."""
    epoch: int
    token_ids: tuple[int, ...]
    reference: str
    """The answer that the data has to it."""


@dataclass(frozen=True)
class Answer:
    """What an engine answered to a prompt."""

    asked: Asked
    rollout: Rollout


def lengths_of(answers: Sequence[Answer]) -> torch.Tensor:
    """(answers,) tokens of each answer."""
    return torch.tensor([len(answer.rollout.token_ids) for answer in answers], dtype=torch.long)


def row_length(answer: Answer) -> int:
    """Tokens of an answer with its prompt."""
    return len(answer.asked.token_ids) + len(answer.rollout.token_ids)


def mask_of(answers: Sequence[Answer]) -> torch.Tensor:
    """(answers, width) bool: where an answer has a token; the longest one has `width`."""
    lengths = lengths_of(answers)
    return torch.arange(max([1, *lengths.tolist()])) < lengths.unsqueeze(1)


def engine_log_probs(answers: Sequence[Answer], width: int) -> torch.Tensor:
    """(answers, width) float32: what the engine said of each token; 0 where there is none."""
    table = torch.zeros(len(answers), width)
    for row, answer in enumerate(answers):
        values = answer.rollout.log_probs
        table[row, : len(values)] = torch.tensor(values)
    return table


def make_answer_batch(answers: Sequence[Answer], pad_token: int) -> Batch:
    """Prompts with their answers, padded on the right; no answers make one row of padding that stands for none.

    Returns:
        `input_ids` (batch, length); `positions` (kept,), numbers into the flattened (batch * length), where the tokens
        of the answers are predicted, row by row; `labels` (1, kept), these tokens. Without answers one position, whose
        label is `IGNORED`.
    """
    rows = [[*answer.asked.token_ids, *answer.rollout.token_ids] for answer in answers] or [[pad_token, pad_token]]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_token, dtype=torch.long)
    positions: list[int] = []
    labels: list[int] = []
    for number, ids in enumerate(rows):
        input_ids[number, : len(ids)] = torch.tensor(ids)
    for number, answer in enumerate(answers):
        start = number * width + len(answer.asked.token_ids) - 1
        positions += range(start, start + len(answer.rollout.token_ids))
        labels += answer.rollout.token_ids
    if not answers:
        positions, labels = [0], [IGNORED]
    return {"input_ids": input_ids, "positions": torch.tensor(positions), "labels": torch.tensor([labels])}


def last_positions(batch: Batch, answers: Sequence[Answer]) -> torch.Tensor:
    """(batch,) the last token of each row of `make_answer_batch`, in the flattened (batch * length)."""
    rows, width = batch["input_ids"].shape
    lengths = [row_length(answer) for answer in answers] or [1]
    return torch.arange(rows) * width + torch.tensor(lengths) - 1


def spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of the tokens, row by row (kept,) -> (answers, width), 0 where `mask` has none."""
    table = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    table[mask.to(values.device)] = values
    return table
