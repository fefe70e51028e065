"""What supervised fine-tuning minimises, token by token.

Each function takes logits (tokens, vocabulary), of any float type, and labels (tokens,), and returns the loss of each
token in float32 (float64 for logits in float64). A label of -100 (torch's `ignore_index`) gives 0, and no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
EAFT_CANDIDATES = 20
"""Tokens whose probabilities stand for the whole distribution's entropy (EAFT, section 3)."""


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """`-(1 - e) log p(label) - e mean(log p)`: the negative log-likelihood, with label smoothing `e`.

    Args:
        label_smoothing: 0 to below 1: the share of the target that is spread over the whole vocabulary (Szegedy et al.
            2016, https://arxiv.org/abs/1512.00567, section 7).
    """
    return torch.nn.functional.cross_entropy(_float(logits), labels, reduction="none", label_smoothing=label_smoothing)


def dft(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`-p(label) log p(label)` with the first factor held constant: dynamic fine-tuning (Wu et al. 2025,
    https://arxiv.org/abs/2508.05629, equation 9). What the model holds for unlikely pulls less."""
    losses = cross_entropy(logits, labels)
    return torch.exp(-losses.detach()) * losses


def eaft(logits: torch.Tensor, labels: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """`-(H / log K)^alpha log p(label)` with the weight held constant: entropy-adaptive fine-tuning
    (https://arxiv.org/abs/2601.02151). `H` is the entropy of the `EAFT_CANDIDATES` likeliest tokens, renormalised, and
    `K` their number, so the weight is from 0 (sure) to 1. What the model is sure of, right or wrong, pulls less.

    Args:
        alpha: 0 or above; 0 is cross-entropy, and the larger it is, the less sure tokens pull.
    """
    with torch.no_grad():
        count = min(EAFT_CANDIDATES, logits.shape[-1])
        likeliest = torch.topk(_float(logits), count, dim=-1).values
        entropy = torch.distributions.Categorical(logits=likeliest).entropy()
        weights = (entropy / math.log(count)).clamp(0.0, 1.0) ** alpha
    return weights * cross_entropy(logits, labels)


def _float(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
