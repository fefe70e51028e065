"""Trainers whose model may have a value head, which has a file and perhaps a learning rate of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayloom.models.value_head import ValueHead, load_value_head, save_value_head, without_value_head
from rayloom.train.example_trainer import ExampleTrainer


class HeadTrainer(ExampleTrainer):
    """Saves and restores the head beside the model."""

    _head: ValueHead | None = None
    _head_rate: float | None = None
    """The head's peak learning rate; None: the job's."""

    def _arrange(self, optimizer: Any) -> None:
        """The head in groups of its own, with their own peak rate."""
        super()._arrange(optimizer)
        if self._head is not None and self._head_rate is not None:
            ratio = self._head_rate / self.args.learning_rate
            optimizer.param_groups[:] = split_groups(optimizer.param_groups, {*map(id, self._head.parameters())}, ratio)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self._head is not None:
            folder = Path(output_dir or str(self.args.output_dir))
            save_value_head(self._head, folder, is_writer=self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The head has a file of its own and is no part of the model's."""
        super()._save(output_dir, without_value_head(self.model, state_dict))

    def restore_own(self, folder: Path) -> None:
        super().restore_own(folder)
        if self._head is not None:
            load_value_head(self._head, folder)


def split_groups(groups: list[dict[str, Any]], head: set[int], ratio: float) -> list[dict[str, Any]]:
    """The parameter groups, those of them with parts of the head divided in two. `ratio`: the head's rate, over the
    job's."""
    made = []
    for group in groups:
        own = [weight for weight in group["params"] if id(weight) in head]
        rest = [weight for weight in group["params"] if id(weight) not in head]
        made += [{**group, "params": rest}] if rest else []
        made += [{**group, "params": own, "lr_ratio": ratio}] if own else []
    return made
