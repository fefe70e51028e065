"""Rewards that a model gives: an adapter on the policy's own base, or a model beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from rayloom.models.value_head import ValueHead, load_value_head, value_head_for
from rayloom.train.batch import Batch, TrainedPositions, model_inputs


class RewardModel(Protocol):
    """Gives every answer of a batch a number."""

    model: Any
    """What computes it."""

    def score(self, batch: Batch) -> torch.Tensor:
        """(answers,) float32, of a batch of `make_answer_batch`."""
        ...


class AdapterRewardModel:
    """A reward adapter on the base that the policy shares: one copy of the base's weights for both.

    Args:
        model: PEFT's, with the reward's adapter loaded under `name` beside the policy's.
        positions: what chooses the positions of the model's output layer.
        folder: where stage `reward` saved adapter and head.
    """

    def __init__(self, model: Any, name: str, positions: TrainedPositions, folder: Path) -> None:
        self.model, self._name, self._positions = model, name, positions
        self._head = _head(model, folder)

    def score(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad(), using_adapter(self.model, self._name):
            return _judged(self.model, self._positions, self._head, batch)


class OwnRewardModel:
    """A whole model with a value head."""

    def __init__(self, model: Any, positions: TrainedPositions, folder: Path) -> None:
        self.model, self._positions = model.requires_grad_(False).eval(), positions
        self._head = _head(model, folder)

    def score(self, batch: Batch) -> torch.Tensor:
        if self.model.device != batch["input_ids"].device:
            self.model.to(batch["input_ids"].device)
        with torch.no_grad():
            return _judged(self.model, self._positions, self._head, batch)


def _judged(model: Any, positions: TrainedPositions, head: ValueHead, batch: Batch) -> torch.Tensor:
    """Of each answer's last token. Heads are made before their models come to a device, and follow them there."""
    states: list[torch.Tensor] = []
    positions.choose(batch["last"], take=states.append)
    model(**model_inputs(batch))
    return head.to(states[0].device)(states[0])


def _head(model: Any, folder: Path) -> ValueHead:
    head = value_head_for(model)
    load_value_head(head, folder)
    return head.requires_grad_(False).to(model.device)


@contextmanager
def using_adapter(model: Any, name: str) -> Iterator[None]:
    """Inside, PEFT's model computes with another of its adapters, without dropout; nothing of it trains."""
    before, was_training = model.base_model.active_adapter, model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    model.base_model.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        model.base_model.set_adapter(before)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)
