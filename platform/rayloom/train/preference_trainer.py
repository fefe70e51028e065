"""The trainer of preferences: the stream's trainer with pairs for batches.

Not TRL's `DPOTrainer`: that tokenizes a whole data set itself, and averages a loss over each batch, not over the pairs
of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from rayloom.losses.pairs import Pairs
from rayloom.losses.preference import LOSSES
from rayloom.stages.config import DpoConfig
from rayloom.train.batch import Batch
from rayloom.train.meter import StepCount
from rayloom.train.pairs import answer_sums, make_pair_batch, pairs_of
from rayloom.train.trainer import StreamTrainer

_MEASURED = ("chosen", "rejected", "accuracy", "margin")


class PreferenceTrainer(StreamTrainer):
    """Makes chosen answers likelier than rejected ones. The loss is averaged over the pairs of the global batch.

    The reference is the model with its adapter off: one copy of the weights.
    """

    loss_is_scaled_for_ga = True  # it is over all of the step's pairs

    def __init__(self, *, preference: DpoConfig, **kw: Any) -> None:
        super().__init__(**kw)
        self._preference = preference
        options = {"label_smoothing": preference.label_smoothing, "gamma": preference.gamma}
        said = {name: value for name, value in options.items() if value is not None}
        self._of_pairs = partial(LOSSES[preference.loss], beta=preference.beta, **said)
        self._sums = torch.zeros(len(_MEASURED) + 1, dtype=torch.float64)  # and the number of pairs

    def _batch(self, table: pa.Table) -> Batch:
        return make_pair_batch(table, self._pad_token)

    def _items(self, step: StepCount) -> int:
        return step.examples

    def _loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """This batch's share of the mean over the step's pairs, times the ranks, whose gradients are averaged."""
        pairs = self._pairs(model, inputs)
        if isinstance(pairs, torch.Tensor):
            return pairs
        losses = self._losses(pairs)
        self._sums += self._measure(pairs).cpu()
        share: torch.Tensor = losses.sum() / kwargs["num_items_in_batch"]
        return share * self.accelerator.num_processes

    def _losses(self, pairs: Pairs) -> torch.Tensor:
        losses = self._of_pairs(pairs)
        return losses - self._preference.ftx * pairs.means[0] if self._preference.ftx else losses

    def _pairs(self, model: Any, inputs: Batch) -> Pairs | torch.Tensor:
        """The log-probabilities of a batch; of one without pairs a loss of nothing that still has the model's graph."""
        positions, labels = inputs["positions"], inputs["labels"][0]
        shape = inputs["input_ids"].shape
        given = {name: tensor for name, tensor in inputs.items() if name in ("input_ids", "position_ids")}
        rows = positions // shape[1]

        def sums(called: Any, *, adapted: bool) -> torch.Tensor:
            self._trained_positions.choose(positions, adapted=adapted)
            return answer_sums(called(**given, use_cache=False).logits[0], labels, rows, shape[0])

        reference = None
        if self._preference.has_reference:
            with torch.no_grad(), self._without_adapter() as beneath:
                reference = sums(beneath, adapted=False)
        policy = sums(model, adapted=True)
        if shape[0] % 2:  # the one row of padding that stands for no pair, so that all ranks call the model as often
            return policy.sum() * 0.0
        return pairs_of(policy, reference, labels, rows)

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

    def _measure(self, pairs: Pairs) -> torch.Tensor:
        """Sums of `_MEASURED` over the pairs, and their number. A reward is what the loss compares, times beta."""
        if self._preference.has_reference:
            chosen, rejected = pairs.ratios
        else:
            chosen, rejected = (pairs.chosen, pairs.rejected) if self._preference.loss == "cpo" else pairs.means
        rewards = self._preference.beta * torch.stack([chosen, rejected]).detach().double()
        margin = rewards[0] - rewards[1]
        rows = torch.stack([*rewards, (margin > 0).double(), margin, torch.ones_like(margin)])
        return rows.sum(dim=1)

    def _stage_metrics(self) -> dict[str, float]:
        means = self._means(self._sums.to(self.args.device))
        self._sums.zero_()
        return {f"rewards/{name}": mean for name, mean in zip(_MEASURED, means, strict=True)}

    def _means(self, sums: torch.Tensor) -> list[float]:
        """All ranks' sums, divided by the number of pairs, which is the last of them."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        *totals, count = sums.tolist()
        return [total / max(1.0, count) for total in totals]

    def _eval_metrics(self, tables: list[pa.Table]) -> dict[str, float]:
        """Means over pairs; `eval_accuracy` is the share of those whose chosen answer has the larger reward."""
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        sums = torch.zeros(len(_MEASURED) + 2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for table in tables:
                inputs = {name: tensor.to(self.args.device) for name, tensor in self._batch(table).items()}
                pairs = self._pairs(model, inputs)
                if isinstance(pairs, Pairs):
                    sums[0] += self._losses(pairs).double().sum()
                    sums[1:] += self._measure(pairs)
        model.train(was_training)
        loss, chosen, rejected, accuracy, margin = self._means(sums)
        return {
            "eval_loss": loss,
            "eval_accuracy": accuracy,
            "eval_rewards/chosen": chosen,
            "eval_rewards/rejected": rejected,
            "eval_rewards/margin": margin,
        }
