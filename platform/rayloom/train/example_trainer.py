"""The trainer of stages whose loss is a mean over examples, not over tokens: rewards, preferences, judgements."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rayloom.data.reference import ReferenceTable, row_keys
from rayloom.errors import JobError
from rayloom.methods.prompts import virtual_tokens
from rayloom.train.batch import Batch, TrainedPositions
from rayloom.train.meter import StepCount
from rayloom.train.pairs import answer_sums
from rayloom.train.token_scores import TokenScorer, TokenScores
from rayloom.train.trainer import StreamTrainer


@dataclass(frozen=True)
class Scores:
    """What a batch's examples gave. Of a batch without examples `losses` is one 0 that still has the model's graph, so
    that every rank calls the model as often."""

    losses: torch.Tensor
    """(examples,)"""
    measures: torch.Tensor
    """(measures, examples), without a graph; nan where an example has none."""


class ExampleTrainer(StreamTrainer):
    """The loss is averaged over the examples of the global batch, whatever ranks and micro-batches they fell into."""

    loss_is_scaled_for_ga = True  # it is over all of the step's examples

    def __init__(self, *, reference: Any = None, cached: ReferenceTable | None = None, **kw: Any) -> None:
        """What losses that compare with the model as it was before training compare with: `reference`, a copy of it, or
        `cached`, what it gave for every row; neither: the model with its adapter off."""
        super().__init__(**kw)
        self._scorer = TokenScorer(kw["model"], self._trained_positions)
        self._copy, self._cached = reference, cached
        if reference is not None:
            reference.requires_grad_(False).eval().to(self.args.device)
            self._copy_scorer = TokenScorer(reference, TrainedPositions(reference, skip=virtual_tokens(reference)))
        self.measured: tuple[str, ...] = self._stage.measures
        self._sums = torch.zeros(2, len(self.measured), dtype=torch.float64)  # of measures, and of how many

    @abstractmethod
    def _scores(self, model: Any, inputs: Batch) -> Scores:
        """Losses and measures of a batch."""

    def _measured(self) -> list[torch.Tensor]:
        return [self._sums]

    def _items(self, step: StepCount) -> int:
        return step.examples

    def _loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """This batch's share of the mean over the step's examples, times the ranks, whose gradients are averaged."""
        scores = self._scores(model, inputs)
        self._sums += _sums(scores.measures).cpu()
        share: torch.Tensor = scores.losses.sum() / kwargs["num_items_in_batch"]
        return share * self.accelerator.num_processes

    def _cached_sums(self, table: pa.Table) -> np.ndarray:
        """(rows, 2): what the reference gave for the sequences of rows that have some."""
        assert self._cached is not None
        try:
            return self._cached.sums(row_keys(table))
        except KeyError as error:
            raise JobError(
                f"stage.reference: the reference log-probabilities of {error.args[0]} are not there; "
                "delete output_dir/reference, and they are computed again"
            ) from None

    def _reference_sums(self, inputs: Batch, weights: torch.Tensor | None = None) -> torch.Tensor:
        """The reference's `answer_sums` of a batch."""
        if self._cached is not None:
            cached: torch.Tensor = inputs["reference"]
            return cached.view(torch.float32)
        return answer_sums(self._said_before(inputs), inputs, weights)

    @torch.no_grad()
    def _said_before(self, batch: Batch, temperature: float = 1.0) -> TokenScores:
        """What the model to compare with says of a batch: the model as it was before training."""
        if self._copy is not None:
            with self.accelerator.autocast():
                return self._copy_scorer(self._copy, batch, temperature=temperature)
        with self._without_adapter() as beneath:
            return self._scorer(beneath, batch, adapted=False, temperature=temperature)

    @contextmanager
    def _without_adapter(self) -> Iterator[Any]:
        """The model beneath, as it was before training: no adapter, no dropout."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        was_training = model.training
        model.eval()
        try:
            with model.disable_adapter():
                yield model
        finally:
            model.train(was_training)

    # --- what is measured --------------------------------------------------------------------------------------------

    def _stage_metrics(self) -> dict[str, float | None]:
        sums = self._sums.to(self.args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        means = dict(zip(self.measured, _means(sums).tolist(), strict=True))
        self._sums.zero_()  # on CPU these are `sums`
        return {name: None if math.isnan(mean) else mean for name, mean in means.items()}

    def _eval_metrics(self, tables: list[pa.Table]) -> dict[str, float]:
        """`eval_loss` and, behind `eval_`, what is measured: means over the examples, and of each set where there are
        several. Nothing but sums is kept."""
        model, names = self.model_wrapped, ("loss", *self.measured)
        was_training = model.training
        model.eval()
        sums = torch.zeros(len(self._eval_names), 2, len(names), dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            self._begin_evaluation(model, tables)
            for table in tables:
                scores = self._scores(model, self._prepare_inputs(self._batch(table)))
                if scores.measures.shape[1] == 0:
                    continue
                rows = torch.cat([scores.losses.unsqueeze(0), scores.measures.to(scores.losses)])
                sets = torch.tensor([of_row[0] for of_row in table["sets"].to_pylist() if of_row], device=rows.device)
                for number in sets.unique().tolist():
                    sums[number] += _eval_sums(rows[:, sets == number])
        model.train(was_training)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        metrics = {f"eval_{name}": mean for name, mean in zip(names, _means(sums.sum(0)).tolist(), strict=True)}
        if len(self._eval_names) > 1:
            for of_set, name in zip(sums, self._eval_names, strict=True):
                if of_set[1, 0]:
                    means = zip(names, _means(of_set).tolist(), strict=True)
                    metrics |= {f"eval_{measure}/{name}": mean for measure, mean in means}
        return metrics

    def _begin_evaluation(self, model: Any, tables: list[pa.Table]) -> None:
        """What must be known of all examples before any is scored."""


def as_input(sums: np.ndarray) -> torch.Tensor:
    """The reference's float32 numbers for a batch, one of padding where there are none. Their bits as whole numbers:
    under DeepSpeed transformers rounds a batch's floating-point numbers to what the model computes in."""
    return torch.from_numpy(np.ascontiguousarray(sums if len(sums) else np.zeros(1, np.float32)).view(np.int32))


def _sums(measures: torch.Tensor) -> torch.Tensor:
    """(2, measures): sums over the examples that have a measure, and how many these are."""
    return torch.stack([measures.nansum(dim=1), (~measures.isnan()).sum(dim=1)]).double()


def _eval_sums(rows: torch.Tensor) -> torch.Tensor:
    """`_sums` of losses, which every example has, and then measures. With a loss that is no number none of the means is
    one: a measure that a spoilt model has not would be left out, and the rest could look like the best evaluation."""
    sums = _sums(rows)
    if rows[0].isnan().any():
        sums[0], sums[1] = torch.nan, rows.shape[1]
    return sums


def _means(sums: torch.Tensor) -> torch.Tensor:
    """No number where there is none to take the mean of."""
    return sums[0] / sums[1]
