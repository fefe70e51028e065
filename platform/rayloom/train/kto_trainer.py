"""The trainer of judged answers.

Not TRL's `KTOTrainer`: its divergence is that of a batch of one worker, so it changes with the batch size, the workers
and the accumulation; here it is that of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from rayloom.losses.judgement import kto
from rayloom.stages.config import KtoConfig
from rayloom.train.batch import Batch, make_batch
from rayloom.train.example_trainer import ExampleTrainer, Scores, as_input
from rayloom.train.pairs import answer_sums, first_sequences, sides_of


class KtoTrainer(ExampleTrainer):
    """Makes good answers likelier and bad ones less likely."""

    _stage: KtoConfig

    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        self._divergence = 0.0  # of the step, or of the evaluation, that is being made

    def _batch(self, table: pa.Table) -> Batch:
        """The answers behind their own prompts; `desirable` (rows,); under `mismatched` the same behind others'."""
        own, mismatched = first_sequences(table), sides_of(table)[1]
        judged = [row for row, ids in zip(table["desirable"].to_pylist(), table["input_ids"], strict=True) if len(ids)]
        batch = make_batch(own, self._pad_token)
        others = make_batch(mismatched, self._pad_token)
        if self._cached is not None:
            sums = self._cached_sums(table.filter(pc.greater(pc.list_value_length(table["input_ids"]), 0)))
            batch["reference"] = as_input(sums[:, 0])
            others["reference"] = as_input(sums[~np.isnan(sums[:, 1]), 1])
        return {**batch, "desirable": torch.tensor(judged, dtype=torch.bool), "mismatched": others}

    def get_batch_samples(self, *args: Any) -> tuple[list[Batch], torch.Tensor | None]:
        """The batches of a step, whose divergence is measured before its first one trains."""
        batches, items = super().get_batch_samples(*args)
        if batches:
            self._divergence = self._measure_divergence(self.model_wrapped, batches)
        return batches, items

    def _begin_evaluation(self, model: Any, tables: list[pa.Table]) -> None:
        self._divergence = self._measure_divergence(model, map(self._batch, tables))

    def _measure_divergence(self, model: Any, batches: Iterable[Batch]) -> float:
        """The mean log-ratio of all ranks' mismatched answers, at least 0. Without dropout: it is no part of the loss's
        gradient, and its noise would be."""
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for batch in batches:
                inputs = self._prepare_inputs(batch["mismatched"])
                ratios = self._ratios(model, inputs)
                is_answer = self._has_answer(inputs)
                total += torch.stack([ratios[is_answer].double().sum(), is_answer.double().sum()])
        model.train(was_training)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return float((total[0] / total[1].clamp(min=1)).clamp(min=0.0))  # no number stays none, so the loss tells

    def _scores(self, model: Any, inputs: Batch) -> Scores:
        ratios, desirable = self._ratios(model, inputs), inputs["desirable"]
        if not len(desirable):  # one row of padding that stands for no answer
            return Scores(ratios * 0.0, torch.empty(len(self.measured), 0))
        rewards = self._stage.beta * ratios.detach()
        nan = torch.full_like(rewards, torch.nan)
        accuracy = ((ratios.detach() > self._divergence) == desirable).to(rewards)
        measures = [
            torch.where(desirable, rewards, nan),
            torch.where(desirable, nan, rewards),
            accuracy,
            torch.full_like(rewards, self._divergence),
        ]
        losses = kto(
            ratios,
            desirable,
            self._divergence,
            self._stage.beta,
            desirable_weight=self._stage.desirable_weight,
            undesirable_weight=self._stage.undesirable_weight,
        )
        return Scores(losses, torch.stack(measures))

    def _ratios(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Log-probability under the policy less that under the reference, (rows,)."""
        reference = self._reference_sums(inputs)
        return answer_sums(self._scorer(model, inputs), inputs) - reference

    def _has_answer(self, inputs: Batch) -> torch.Tensor:
        """(rows,) bool: all but the row of padding of a batch without rows."""
        rows, length = inputs["input_ids"].shape
        found = torch.zeros(rows, dtype=torch.bool, device=inputs["labels"].device)
        found[(inputs["positions"] // length)[inputs["labels"][0] >= 0]] = True
        return found
