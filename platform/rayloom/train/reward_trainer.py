"""The trainer of reward models: a value head on the model, read at the last token of each answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from rayloom.losses.reward import bradley_terry
from rayloom.models.value_head import ValueHead, load_value_head, save_value_head, without_value_head
from rayloom.stages.config import RewardConfig
from rayloom.train.batch import Batch
from rayloom.train.example_trainer import ExampleTrainer, Scores
from rayloom.train.pairs import make_reward_batch


class RewardTrainer(ExampleTrainer):
    """Gives chosen answers a larger reward than rejected ones. The model has a head already (`attach_value_head`)."""

    _stage: RewardConfig

    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        self._head: ValueHead = kw["model"].v_head

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

    def create_optimizer(self, model: Any = None) -> Any:
        """The head in groups of its own, with their own peak rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate = self._stage.head_learning_rate
        if is_new and rate is not None:
            ratio = rate / self.args.learning_rate
            optimizer.param_groups[:] = _split(optimizer.param_groups, {*map(id, self._head.parameters())}, ratio)
        return optimizer

    # --- the head's file ---------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        save_value_head(self._head, Path(output_dir or str(self.args.output_dir)), is_writer=self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The head has a file of its own and is no part of the model's."""
        super()._save(output_dir, without_value_head(self.model, state_dict))

    def restore_own(self, folder: Path) -> None:
        load_value_head(self._head, folder)


def _split(groups: list[dict[str, Any]], head: set[int], ratio: float) -> list[dict[str, Any]]:
    """The parameter groups, those of them with parts of the head divided in two. `ratio`: the head's rate, over the
    job's."""
    made = []
    for group in groups:
        own = [weight for weight in group["params"] if id(weight) in head]
        rest = [weight for weight in group["params"] if id(weight) not in head]
        made += [{**group, "params": rest}] if rest else []
        made += [{**group, "params": own, "lr_ratio": ratio}] if own else []
    return made
