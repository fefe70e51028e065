"""Of logits at some positions: the log-probability of the token that came, and how sure the model was."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

_CHUNK = 1024
"""Positions whose logits stand in float32 at a time."""


def token_scores(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, *, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy in nats of each distribution, (kept,) both, in float32.

    Never more than some thousand positions' logits are in float32 at a time, in the backward pass too.

    Args:
        logits: (kept, vocabulary), divided by `temperature` first.
        labels: (kept,); where it is below 0 both are 0.
        entropy: whether the entropy is wanted; else it is 0 everywhere.
    """
    found = [
        checkpoint(_scores, logits[start : start + _CHUNK], labels[start : start + _CHUNK], temperature, entropy,
                   use_reentrant=False)
        for start in range(0, len(labels), _CHUNK)
    ]  # fmt: skip
    log_probs, entropies = zip(*found, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


def _scores(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    log_probs = -torch.nn.functional.cross_entropy(scaled, labels, reduction="none")  # of IGNORED 0
    if not entropy:
        return log_probs, torch.zeros_like(log_probs)
    whole = scaled.log_softmax(-1)
    return log_probs, -(whole.exp() * whole).sum(-1) * (labels >= 0)
