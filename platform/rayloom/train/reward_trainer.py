"""The trainer of reward models: a value head on the model, read at the last token of each answer.

Not TRL's `RewardTrainer`: that tokenizes a whole data set itself, and trains a model for classification, where stage
ppo wants a head beside an adapter, on the base that its policy has too.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch

from rayloom.losses.reward import bradley_terry
from rayloom.stages.config import RewardConfig
from rayloom.train.batch import Batch
from rayloom.train.example_trainer import Scores
from rayloom.train.head_file import HeadTrainer
from rayloom.train.pairs import make_reward_batch


class RewardTrainer(HeadTrainer):
    """Gives chosen answers a larger reward than rejected ones. The model has a head already (`attach_value_head`)."""

    _stage: RewardConfig

    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        self._head, self._head_rate = kw["model"].v_head, self._stage.head_learning_rate

    def _batch(self, table: pa.Table) -> Batch:
        return make_reward_batch(table, self._pad_token)

    def _scores(self, model: Any, inputs: Batch) -> Scores:
        self._trained_positions.choose(inputs["positions"])
        given = {name: tensor for name, tensor in inputs.items() if name in ("input_ids", "position_ids")}
        rewards = model(**given, use_cache=False).logits[0, :, 0]
        if len(rewards) % 2:  # one row of padding that stands for no pair
            return Scores(rewards * 0.0, torch.empty(len(self.measured), 0))
        chosen, rejected = rewards.chunk(2)
        margin = (chosen - rejected).detach()
        measures = torch.stack([chosen.detach(), rejected.detach(), margin, (margin > 0).to(margin)])
        return Scores(bradley_terry(chosen, rejected, center=self._stage.center), measures)
