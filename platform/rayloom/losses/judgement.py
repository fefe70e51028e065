"""What is minimised over answers that were judged one by one."""

from __future__ import annotations

import torch


def kto(
    ratios: torch.Tensor,
    desirable: torch.Tensor,
    divergence: torch.Tensor | float,
    beta: float,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """`a (1 - s(beta (r - z)))` of good answers, `b (1 - s(beta (z - r)))` of bad ones, (answers,): Kahneman-Tversky
    optimization (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 8).

    Args:
        ratios: `r`, log-probability under the policy less that under the reference, (answers,).
        desirable: which answers are good ones, (answers,), bool.
        divergence: `z`, 0 or above, held constant: how far the policy is from the reference, for which the paper takes
            the mean log-ratio of answers that stand behind other prompts than their own.
        desirable_weight: `a`.
        undesirable_weight: `b`.
    """
    lead = beta * (ratios - divergence)
    good, bad = 1 - torch.sigmoid(lead), 1 - torch.sigmoid(-lead)
    return torch.where(desirable, desirable_weight * good, undesirable_weight * bad)
