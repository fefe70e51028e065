"""The trainer of preferences.

Not TRL's `DPOTrainer`, nor its experimental ones for CPO and ORPO: they tokenize a whole data set themselves, and
average a loss over each batch, not over the pairs of the global batch.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from rayloom.losses.pairs import Pairs, tail_weights
from rayloom.losses.preference import LOSSES
from rayloom.stages.config import DpoConfig
from rayloom.train.batch import Batch
from rayloom.train.example_trainer import ExampleTrainer, Scores, as_input
from rayloom.train.pairs import answer_sums, make_pair_batch, pairs_of, second_starts

_REWARDS_FILE = "rewards.json"


class PreferenceTrainer(ExampleTrainer):
    """Makes chosen answers likelier than rejected ones."""

    _stage: DpoConfig

    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        self._shifts = "bco_pair" in self._stage.weights
        # Of all rewards before this step: their sum and number, the same on every rank; and those of this step, here.
        self._before = torch.zeros(2, dtype=torch.float64)
        self._now = torch.zeros(2, dtype=torch.float64)

    def _batch(self, table: pa.Table) -> Batch:
        batch = make_pair_batch(table, self._pad_token)
        if self._cached is not None:  # of all chosen answers, then of all rejected ones, as the batch has them
            sums = self._cached_sums(table.filter(pa.array(second_starts(table), pa.int64()).cast(pa.bool_())))
            batch["reference"] = as_input(sums.T.flatten())
        return batch

    def _scores(self, model: Any, inputs: Batch) -> Scores:
        pairs = self._pairs(model, inputs)
        if isinstance(pairs, torch.Tensor):
            return Scores(pairs, torch.empty(len(self.measured), 0))
        rewards = self._rewards(pairs)
        if self._shifts and model.training:
            self._now += torch.tensor([rewards.sum().item(), rewards.numel()], dtype=torch.float64)
        margin = rewards[0] - rewards[1]
        return Scores(self._losses(pairs), torch.stack([*rewards, margin, (margin > 0).to(margin)]))

    def _losses(self, pairs: Pairs) -> torch.Tensor:
        losses = torch.zeros_like(pairs.chosen)
        for name, weight in self._stage.weights.items():
            losses = losses + weight * LOSSES[name](pairs, self._stage.beta, **self._options(name))
        return losses - self._stage.ftx * pairs.means[0] if self._stage.ftx else losses

    def _options(self, name: str) -> dict[str, float]:
        """What a loss takes besides beta."""
        if name == "bco_pair":
            return {"shift": float(self._before[0] / self._before[1].clamp(min=1))}
        known = inspect.signature(LOSSES[name]).parameters
        options = {"label_smoothing": self._stage.label_smoothing, "gamma": self._stage.gamma}
        return {option: value for option, value in options.items() if value is not None and option in known}

    def _rewards(self, pairs: Pairs) -> torch.Tensor:
        """What the losses compare, times beta: (2, pairs), the chosen answers' first."""
        if self._stage.has_reference:
            rewards = pairs.ratios
        else:
            rewards = (pairs.chosen, pairs.rejected) if "cpo" in self._stage.weights else pairs.means
        return self._stage.beta * torch.stack(rewards).detach()

    def _pairs(self, model: Any, inputs: Batch) -> Pairs | torch.Tensor:
        """The log-probabilities of a batch; of one without pairs a loss of nothing that still has the model's graph."""
        positions, labels = inputs["positions"], inputs["labels"][0]
        shape = inputs["input_ids"].shape
        rows = positions // shape[1]
        is_empty = shape[0] % 2 == 1  # one row of padding that stands for no pair
        alpha = self._stage.ld_alpha
        weights = None if alpha is None or is_empty else tail_weights(rows, labels, shape[0], alpha)
        reference = self._reference_sums(inputs, weights) if self._stage.has_reference else None
        policy = answer_sums(self._scorer(model, inputs), inputs, weights)
        return policy * 0.0 if is_empty else pairs_of(policy, reference, labels, rows)

    # --- the mean of all rewards before, which bco_pair subtracts --------------------------------------------------

    def get_batch_samples(self, *args: Any) -> Any:
        self._settle_rewards()
        return super().get_batch_samples(*args)

    def _settle_rewards(self) -> None:
        """Add the rewards of the step that has been made to those before, of all ranks."""
        if not self._shifts:
            return
        now = self._now.to(self.args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(now)
        if not self._guard.left_out_last and now.isfinite().all():  # else they would spoil the mean for good
            self._before += now.cpu()
        self._now.zero_()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._settle_rewards()
        super()._save_checkpoint(model, trial)

    def save_own(self, folder: Path) -> None:
        if self._shifts:
            (folder / _REWARDS_FILE).write_text(json.dumps(self._before.tolist()))

    def restore_own(self, folder: Path) -> None:
        if self._shifts:
            self._before = torch.tensor(json.loads((folder / _REWARDS_FILE).read_text()), dtype=torch.float64)
