"""`stage.reference: cached`: what the model before this training says of every row, computed once and kept.

Before the policy is loaded, each worker goes through its part of the stream that the training will take:

    some steps' batches -> rows that are not in the store -> sums by the reference -> told to all; rank 0 writes

The reference is loaded when the first row is missing, and gone before the policy comes: one copy of the weights is in
memory at a time. What has been written stays when the job breaks off, whatever the number of workers then is.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rayloom.data.reference import ReferenceTable, mark_whole, read_table, row_keys, write_part
from rayloom.data.rows import SCHEMA
from rayloom.errors import JobError
from rayloom.losses.pairs import tail_weights
from rayloom.methods.prompts import virtual_tokens
from rayloom.train.batch import TrainedPositions, make_batch
from rayloom.train.collective import of_all_ranks
from rayloom.train.pairs import answer_sums, first_sequences, second_starts, sides_of
from rayloom.train.token_scores import TokenScorer

_ROUND_ROWS = 1024
"""Rows of each worker between two times that the workers tell each other what they found."""


@dataclass
class Scorer:
    """The reference as it computes."""

    load: Callable[[], Any]
    pad_token: int
    device: torch.device
    autocast: torch.dtype | None
    """What it computes in, where that is not what its weights are in."""
    zero3: dict[str, Any] | None
    """The DeepSpeed configuration of a model that is loaded in shards; None: it is loaded whole."""
    ld_alpha: float | None = None
    """As in `DpoConfig`: chosen and rejected answers are weighed together."""

    @cached_property
    def _model(self) -> Any:
        model = self.load().requires_grad_(False).eval()
        self._scorer = TokenScorer(model, TrainedPositions(model, skip=virtual_tokens(model)))
        if self.zero3 is None:
            return model.to(self.device)
        import deepspeed

        engine, *_ = deepspeed.initialize(model=model, config=self.zero3)
        engine.eval()  # which returns nothing
        return engine

    def sums(self, table: pa.Table) -> np.ndarray:
        """(rows, 2) float32 of rows that have tokens; nan where a row has no second sequence. Of no rows the model is
        called all the same: one in shards is called by all workers or by none."""
        first, second = first_sequences(table), sides_of(table)[1]
        inputs = {
            name: tensor.to(self.device)
            for name, tensor in make_batch(pa.concat_tables([first, second]), self.pad_token).items()
        }
        weights = None
        if self.ld_alpha is not None and table.num_rows:
            rows = inputs["positions"] // inputs["input_ids"].shape[1]
            weights = tail_weights(rows, inputs["labels"][0], first.num_rows + second.num_rows, self.ld_alpha)
        model = self._model
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, self.autocast))
            found = answer_sums(self._scorer(model, inputs), inputs, weights).cpu().numpy()
        sums = np.full((table.num_rows, 2), np.nan, dtype=np.float32)
        sums[:, 0] = found[: table.num_rows]
        has_second = np.array(second_starts(table), dtype=bool)
        sums[has_second, 1] = found[table.num_rows : table.num_rows + has_second.sum()]
        return sums

    def close(self) -> None:
        """Give the model's memory back."""
        model = self.__dict__.pop("_model", None)
        if self.zero3 is not None and model is not None:
            model.destroy()
        del model
        self.__dict__.pop("_scorer", None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Round:
    """What some batches of all workers gave."""

    computed: int
    """Rows that were missing."""
    steps: int
    """Steps that the training will make of them: it makes none of batches in which nothing is trained."""
    epochs_done: float
    is_last: bool
    """The stream has ended, or the job was told to stop."""


@dataclass(frozen=True)
class ReferencePass:
    """What the workers do together before the training."""

    folder: Path
    mark: str
    batch_rows: int
    """Rows of a forward pass."""
    batches_per_step: int
    """Of each worker."""
    steps: int | None
    """Steps that the training will make; None: to the end of the stream."""
    epochs: int
    from_start: bool
    """Whether the stream begins where the job does, so that the end of it completes the store."""
    stop: Callable[[], bool]
    """Whether the job was told to stop; asked on rank 0."""
    say: Callable[[str], None]

    def run(self, tables: Iterator[pa.Table], eval_tables: list[pa.Table], scorer: Scorer) -> ReferenceTable:
        """Find or compute the sums of this worker's batches and of all others'. Every worker calls it.

        Raises:
            JobError: they cannot be written.
        """
        known, started, computed = read_table(self.folder), time.monotonic(), 0
        try:
            computed = self._round(eval_tables, known, scorer).computed
            left, epochs_done = self.steps, 0.0
            while left is None or left > 0:
                at_once = max(1, _ROUND_ROWS // (self.batch_rows * self.batches_per_step))
                count = at_once if left is None else min(at_once, left)
                batches = list(itertools.islice(tables, count * self.batches_per_step))
                found = self._round(batches, known, scorer)
                computed += found.computed
                epochs_done = max(epochs_done, found.epochs_done)
                left = None if left is None else left - found.steps
                if found.is_last:
                    break
        finally:
            scorer.close()
        self._end(known, computed, time.monotonic() - started, left, epochs_done)
        return known

    def _round(self, batches: list[pa.Table], known: ReferenceTable, scorer: Scorer) -> _Round:
        missing, keys = _missing(batches, known)
        groups = range(0, len(batches), self.batches_per_step)
        trains = [_has_labels(batches[start : start + self.batches_per_step]) for start in groups]
        epochs_done = max([0.0, *(done for table in batches for done in table["epochs_done"].to_pylist())])
        stop = _rank() == 0 and self.stop()
        told = of_all_ranks((len(keys), trains, stop, epochs_done))
        rounds = max(-(-count // self.batch_rows) for count, *_ in told)
        parts = []
        for number in range(rounds):
            batch = missing.slice(number * self.batch_rows, self.batch_rows)
            if batch.num_rows or scorer.zero3 is not None:
                parts.append(scorer.sums(batch))
        computed = 0
        if rounds:
            mine = np.concatenate([np.empty((0, 2), dtype=np.float32), *parts])
            found = of_all_ranks((keys, mine))
            keys, sums = (np.concatenate([part[i] for part in found]) for i in range(2))
            keys, first = np.unique(keys, return_index=True)
            known.add(keys, sums[first])
            computed = len(keys)
            if _rank() == 0:
                self._write(keys, sums[first])
        return _Round(
            computed,
            steps=sum(any(of_step) for of_step in zip(*(trains for _, trains, *_ in told), strict=True)),
            epochs_done=max(done for *_, done in told),
            is_last=not batches or any(stop for _, _, stop, _ in told),
        )

    def _write(self, keys: np.ndarray, sums: np.ndarray) -> None:
        try:
            write_part(self.folder, keys, sums)
        except OSError as error:
            raise JobError(
                f"reference log-probabilities cannot be written to {self.folder}: {error.strerror or error}"
            ) from error

    def _end(self, known: ReferenceTable, computed: int, seconds: float, left: int | None, epochs: float) -> None:
        is_whole = left == 0 if left is not None else epochs >= self.epochs
        if _rank() != 0:
            return
        if computed:
            self.say(f"reference log-probabilities of {computed:,} rows in {seconds:.1f} s, kept in {self.folder}")
        else:
            self.say(f"reference log-probabilities are read from {self.folder}")
        if self.from_start and is_whole:
            mark_whole(self.folder, self.mark, {"rows": len(known)})


def _missing(batches: list[pa.Table], known: ReferenceTable) -> tuple[pa.Table, np.ndarray]:
    """The rows with tokens that are not known yet, each once, neighbours of nearly one length; and their keys."""
    if not batches:
        return SCHEMA.empty_table(), np.empty(0, dtype=np.uint64)
    table = pa.concat_tables(batches)
    lengths = np.array([len(ids) for ids in table["input_ids"]])
    keys = row_keys(table)
    keys, first = np.unique(keys, return_index=True)
    wanted = (lengths[first] > 0) & ~known.has(keys)
    keys, first = keys[wanted], first[wanted]
    order = np.argsort(lengths[first], kind="stable")
    return table.take(first[order]), keys[order]


def _has_labels(batches: list[pa.Table]) -> bool:
    """Whether something is trained in them."""
    return any((labels.values.to_numpy()[1:] >= 0).any() for table in batches for labels in table["labels"])


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
