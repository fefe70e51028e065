"""Rewards that a model gives: an adapter on the policy's own base, or a model beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from rayloom.models.value_head import ValueHead, load_value_head, value_head_for
from rayloom.train.batch import Batch
from rayloom.train.ppo_answers import model_inputs


class RewardModel(Protocol):
    """Gives every answer of a batch a number."""

    model: Any
    """What computes it."""

    def score(self, batch: Batch) -> torch.Tensor:
        """(answers,) float32, of a batch of `make_answer_batch`."""
        ...


class OutputStates:
    """Keeps what a model's output layer was last given: (kept, width) hidden states at chosen positions."""

    def __init__(self, model: Any) -> None:
        self.last: torch.Tensor | None = None
        self._wanted = False
        model.get_output_embeddings().register_forward_hook(self._look)

    @contextmanager
    def wanted(self) -> Iterator[None]:
        """Inside, forward passes leave their states in `last`."""
        self._wanted = True
        try:
            yield
        finally:
            self._wanted = False

    def _look(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if self._wanted:
            self.last = inputs[0].flatten(0, 1)


class AdapterRewardModel:
    """A reward adapter on the base that the policy shares: one copy of the base's weights for both.

    Args:
        model: PEFT's, with the reward's adapter loaded under `name` beside the policy's.
        positions: what chooses the positions of the model's output layer.
        states: of the same model, made after `positions`.
        folder: where stage `reward` saved adapter and head.
    """

    def __init__(self, model: Any, name: str, positions: Any, states: OutputStates, folder: Path) -> None:
        self.model, self._name, self._positions, self._states = model, name, positions, states
        self._head = _head(model, folder)

    def score(self, batch: Batch) -> torch.Tensor:
        self._positions.choose(batch["last"])
        with torch.no_grad(), using_adapter(self.model, self._name), self._states.wanted():
            self.model(**model_inputs(batch))
        return _judged(self._head, self._states)


class OwnRewardModel:
    """A whole model with a value head."""

    def __init__(self, model: Any, positions: Any, folder: Path) -> None:
        self.model, self._positions = model.requires_grad_(False).eval(), positions
        self._states = OutputStates(model)
        self._head = _head(model, folder)

    def score(self, batch: Batch) -> torch.Tensor:
        if self.model.device != batch["input_ids"].device:
            self.model.to(batch["input_ids"].device)
        self._positions.choose(batch["last"])
        with torch.no_grad(), self._states.wanted():
            self.model(**model_inputs(batch))
        return _judged(self._head, self._states)


def _judged(head: ValueHead, states: OutputStates) -> torch.Tensor:
    """Heads are made before their models come to a device, and follow them there."""
    assert states.last is not None  # the output layer has run
    return head.to(states.last.device)(states.last)


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
