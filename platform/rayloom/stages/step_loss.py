"""From a stage's config to the loss of a batch. Imports torch, which what encodes the data must not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rayloom.losses.token import TokenLoss, cross_entropy, dft, eaft
from rayloom.stages.config import SftConfig, StageConfig

StepLoss = Callable[..., torch.Tensor]


def token_loss(config: StageConfig) -> TokenLoss | None:
    """What each trained token's loss is; None: plain cross-entropy, which models compute themselves."""
    if not isinstance(config, SftConfig):
        return None
    if config.loss == "dft":
        return dft
    if config.loss == "eaft":
        return partial(eaft, alpha=config.eaft_alpha)
    return partial(cross_entropy, label_smoothing=config.label_smoothing) if config.label_smoothing else None


def averages_over_step(model: Any) -> bool:
    """Whether a model's own loss is the batch's share of the mean over a step's tokens, where it is told how many these
    are. Bart and its kin take the number and do not look at it: theirs is the mean over the batch."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward: Any = inspect.unwrap(type(base).forward)
    return "loss_function" in forward.__code__.co_names  # transformers' own, which divides by it


def step_loss(loss: TokenLoss, router_coefficient: float = 0.0) -> StepLoss:
    """A `compute_loss_func` for transformers' Trainer: the batch's share of the mean over the step's trained tokens.

    Args:
        router_coefficient: what a mixture of experts adds of its router's loss, for each batch
            (`rayloom.models.experts.use_router_loss`).
    """

    def compute(outputs: Any, labels: torch.Tensor, *, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        total = loss(outputs.logits[0], labels[0]).sum() / num_items_in_batch
        return total + router_coefficient * outputs.aux_loss if router_coefficient else total

    return compute
