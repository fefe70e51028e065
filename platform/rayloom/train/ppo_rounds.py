"""Rounds of prompts: read from the stream, asked ahead of the training, handed out in order.

Round r may be asked for as soon as version r - `max_staleness` is served, so nothing that was answered is ever too old
to be learnt from, and nothing is thrown away.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
import transformers

from rayloom.errors import JobError
from rayloom.rollout.fleet import FleetClient, Pending
from rayloom.rollout.request import Prompt, Sampling
from rayloom.train.collective import over_ranks
from rayloom.train.meter import BatchCount, StepCount
from rayloom.train.ppo_answers import Answer, Asked


@dataclass
class Round:
    """One round of this rank, from its prompts to its answers."""

    number: int
    """Rounds that were learnt from before it."""
    asked: list[Asked]
    count: StepCount | None
    """All ranks' prompts: where the stream is behind them, and how many of which set; None: they are no part of the
    training."""
    answers: list[Answer] | None = None
    """Once they have been collected."""
    pending: Pending | None = field(default=None, repr=False)
    """What the fleet gave for asking, until they are collected."""


@dataclass(frozen=True)
class RankFleet:
    """The engines, as a rank asks them."""

    client: FleetClient
    rank: int
    ranks: int
    samples: int
    """Answers to each prompt."""
    sampling: Sampling
    seed: int

    def ask(self, of_round: Round) -> None:
        """Have a round's prompts answered; returns at once. Every rank asks for every round."""
        prompts = [
            Prompt(asked.number, asked.token_ids, sample_seed(self.seed, asked), self.samples)
            for asked in of_round.asked
        ]
        of_round.pending = self.client.ask(of_round.number, self.rank, self.ranks, prompts, self.sampling)

    def collect(self, of_round: Round) -> None:
        """Wait for a round's answers.

        Raises:
            JobError: the fleet gave up, or did not answer in time.
        """
        by_number = {asked.number: asked for asked in of_round.asked}
        assert of_round.pending is not None  # it was asked for
        of_round.answers = [Answer(by_number[rollout.prompt], rollout) for rollout in of_round.pending.collect()]
        of_round.pending = None


def sample_seed(seed: int, asked: Asked) -> int:
    """The seed of a prompt's answers, 31 bits: of the row and the epoch, whatever rank and engine it comes to."""
    text = f"{seed} {asked.epoch} {asked.set} {asked.row}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


class RoundReader:
    """This rank's rounds, in order.

    Args:
        tables: of each round this rank's rows of the stream.
        per_rank: prompts of a round that a rank has, at most.
        device: for the one collective call that counts a round.
        first: the number of the first round.
        kept: rounds that were answered, but not learnt from, when the checkpoint was made.
    """

    def __init__(
        self,
        tables: Iterator[pa.Table],
        fleet: RankFleet,
        *,
        per_rank: int,
        sets: int,
        max_staleness: int,
        device: Any,
        first: int,
        kept: Sequence[Round] = (),
    ) -> None:
        self._tables, self._fleet = tables, fleet
        self._first_number = fleet.rank * per_rank
        self._sets, self._max_staleness, self._device = sets, max_staleness, device
        self._ahead: deque[Round] = deque(kept)
        self._next = first + len(self._ahead)
        self._ended = False
        self.rest: StepCount | None = None
        """Behind the last round: rows that were left out, if any."""

    def take(self, version: int) -> Round | None:
        """The next round, with its answers; None where the stream has ended. Every rank calls it.

        Args:
            version: of the weights that the engines serve now, which is the round's number.

        Raises:
            JobError: an answer came from weights that are too old, or the fleet gave up.
        """
        while not self._ended and self._next <= version + self._max_staleness:
            self._read()
        if not self._ahead:
            return None
        taken = self._ahead.popleft()
        if taken.answers is None:
            self._fleet.collect(taken)
        for answer in taken.answers or []:
            if not version - self._max_staleness <= answer.rollout.policy_version <= version:
                raise JobError(
                    f"round {taken.number}: engine {answer.rollout.engine} answered with the weights of version "
                    f"{answer.rollout.policy_version}, and version {version} learns from it; "
                    f"rollout.max_staleness is {self._max_staleness}"
                )
        return taken

    def answered_ahead(self) -> list[Round]:
        """The rounds that come next and that the fleet has answered on every rank. Every rank calls it."""
        ready = 0
        for one in self._ahead:
            if one.answers is None and not (one.pending is not None and one.pending.is_ready):
                break
            ready += 1
        fewest = -int(over_ranks(torch.tensor([-float(ready)]), self._device, "max")[0])
        rounds = list(self._ahead)[:fewest]
        for one in rounds:
            if one.answers is None:
                self._fleet.collect(one)
        return rounds

    def _read(self) -> None:
        """Ask for one more round. Rows that are left out before it are counted with it."""
        count = BatchCount(self._sets)
        asked: list[Asked] = []
        while True:
            table = next(self._tables, None)
            if table is not None:
                count.add(table)
                asked = asked_of(table, self._first_number)
            total = count.share(self._device, stop=False)
            if table is None:
                self._ended, self.rest = True, total if total.batches else None  # of no rows it has no position
                return
            if total.examples:
                break
        self._ahead.append(Round(self._next, asked, total))
        self._fleet.ask(self._ahead[-1])
        self._next += 1


def asked_of(table: pa.Table, first: int) -> list[Asked]:
    """The prompts of some rows of the stream. They are numbered from `first` on, rows that were left out too."""
    columns = table.select(["input_ids", "sets", "rows", "epoch", "answer"]).to_pylist()
    return [
        Asked(first + number, row["sets"][0], row["rows"][0], row["epoch"], tuple(row["input_ids"]), row["answer"])
        for number, row in enumerate(columns)
        if row["sets"]
    ]


class RoundEnd(transformers.TrainerCallback):
    """Puts checkpoints and evaluations off to the end of the round."""

    def __init__(self, end_step: Callable[[], bool]) -> None:
        """`end_step` is called behind each optimizer step: whether it was the round's last."""
        self._end_step = end_step
        self._put_off: set[str] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_over = self._end_step()
        for wish in ("should_save", "should_evaluate"):
            if getattr(control, wish):
                self._put_off.add(wish)
            setattr(control, wish, is_over and wish in self._put_off)
        if is_over:
            control.should_log |= bool(self._put_off)  # a row of metrics ends there
            self._put_off.clear()
