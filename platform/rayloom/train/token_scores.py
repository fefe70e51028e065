"""What a model says of the trained tokens of a batch: their log-probabilities, how sure it was, a critic's values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rayloom.train.batch import Batch, TrainedPositions, model_inputs
from rayloom.train.frozen_head import frozen_head, is_frozen
from rayloom.train.head_scores import Entropy, as_computed, head_scores

_CHUNK = 1024
"""Positions whose logits stand in float32 at a time."""


@dataclass(frozen=True)
class TokenScores:
    """Of the tokens that a batch has labels of, (kept,) float32 each."""

    log_probs: torch.Tensor
    """Of a position without a label 0."""
    entropies: torch.Tensor
    """In nats; 0 where they were not asked for."""
    values: torch.Tensor | None
    """The critic's, where the model has one."""


class TokenScorer:
    """Asks a model. Where its output layer is frozen and plain, the logits are never there as a whole."""

    def __init__(self, model: Any, positions: TrainedPositions) -> None:
        """
        Args:
            model: as it is before anything wraps it.
            positions: of this model.
        """
        self._positions, self._head = positions, frozen_head(model)

    def __call__(
        self,
        called: Any,
        batch: Batch,
        *,
        adapted: bool = True,
        temperature: float = 1.0,
        entropy: Entropy = "none",
    ) -> TokenScores:
        """Call the model, or what wraps it.

        Args:
            batch: `input_ids`, perhaps `position_ids`, `positions` (kept,) and `labels` (1, kept).
            adapted: whether the method's virtual tokens are there.
            temperature: logits are divided by it.
        """
        hidden: list[torch.Tensor] = []

        def take(states: torch.Tensor) -> None:  # within the forward pass, and so within its autocast
            hidden.append(as_computed(states))

        head = self._head if self._head is not None and is_frozen(self._head) else None
        self._positions.choose(batch["positions"], adapted=adapted, take=take if head is not None else None)
        output = called(**model_inputs(batch))
        labels = batch["labels"][0]
        if head is None:
            scores = logit_scores(output.logits[0], labels, temperature, entropy=entropy)
        else:
            scores = head_scores(head, hidden[0], labels, temperature, entropy=entropy)
        return TokenScores(*scores, output["state_values"][0] if "state_values" in output else None)


def logit_scores(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, *, entropy: Entropy = "none"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy in nats of each distribution, (kept,) both, in float32.

    Never more than some thousand positions' logits are in float32 at a time, in the backward pass too.

    Args:
        logits: (kept, vocabulary), divided by `temperature` first.
        labels: (kept,); where it is below 0 both are 0.
        entropy: where it is not wanted, it is 0.
    """
    found = [
        checkpoint(_scores, logits[start : start + _CHUNK], labels[start : start + _CHUNK], temperature, entropy,
                   use_reentrant=False)
        for start in range(0, len(labels), _CHUNK)
    ]  # fmt: skip
    log_probs, entropies = zip(*found, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


def _scores(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float, entropy: Entropy
) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    log_probs = -torch.nn.functional.cross_entropy(scaled, labels, reduction="none")  # of IGNORED 0
    if entropy == "none":
        return log_probs, torch.zeros_like(log_probs)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "trained"):
        whole = scaled.log_softmax(-1)
        return log_probs, -(whole.exp() * whole).sum(-1) * (labels >= 0)
