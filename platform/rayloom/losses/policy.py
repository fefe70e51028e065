"""Losses of policy optimization: of each token of an answer, and how they become one number.

Log-probabilities are of the tokens that were drawn, under the sampling temperature.
"""

from __future__ import annotations

from typing import Literal

import torch

Estimator = Literal["k1", "k2", "k3"]


def clipped_policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """The negative of PPO's clipped objective (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7).

    Args:
        log_probs: (tokens,) of the policy that trains.
        old_log_probs: (tokens,) of the policy before the round; no gradient.
        advantages: (tokens,).
        clip: the ratio counts from 1 - clip on.
        clip_high: up to 1 + this (https://arxiv.org/abs/2503.14476, equation 10); None: `clip`.
        dual_clip: bound of the ratio where the advantage is negative (https://arxiv.org/abs/1912.09729, equation 5);
            None: none.

    Returns:
        (tokens,)
    """
    ratio = (log_probs - old_log_probs).exp()
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    objective = torch.minimum(ratio * advantages, bounded * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective


def clipped_share(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """(tokens,) 1 where a clip of `clipped_policy_loss` has taken the gradient away, else 0."""
    ratio = (log_probs - old_log_probs).detach().exp()
    above = (advantages > 0) & (ratio > 1 + (clip if clip_high is None else clip_high))
    below = (advantages < 0) & (ratio < 1 - clip)
    if dual_clip is not None:
        below |= (advantages < 0) & (ratio > dual_clip)
    return (above | below).to(log_probs.dtype)


def importance_weights(old_log_probs: torch.Tensor, engine_log_probs: torch.Tensor, cap: float) -> torch.Tensor:
    """By how much likelier a token was for the trainer than for the engine that drew it, at most `cap`, (tokens,);
    no gradient. Truncated importance sampling (Ionides 2008; https://arxiv.org/abs/2509.12517 for language models)."""
    return (old_log_probs - engine_log_probs).detach().exp().clamp(max=cap)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Half the square of a value's error; with `clip` the larger one of it and that of the value held within `clip` of
    the one before the round (https://arxiv.org/abs/1811.02553, section 2). (tokens,)"""
    errors = (values - returns).square()
    if clip is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (held - returns).square())
    return 0.5 * errors


def kl_estimate(log_probs: torch.Tensor, reference: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """Of each token an estimate of the divergence from the reference (http://joschu.net/blog/kl-approx.html).

    With r = log_probs - reference: `k1` r, `k2` r^2 / 2, `k3` exp(-r) - 1 + r. Unbiased are k1 and k3. (tokens,)
    """
    ratio = log_probs - reference
    if estimator == "k1":
        return ratio
    if estimator == "k2":
        return 0.5 * ratio.square()
    return (-ratio).exp() - 1 + ratio


def mean_over(
    losses: torch.Tensor,
    answer_lengths: torch.Tensor,
    over: Literal["tokens", "answers", "most tokens"],
    *,
    tokens: int,
    answers: int,
    max_tokens: int,
) -> torch.Tensor:
    """This part's share of a step's mean loss; the parts of all ranks and micro-batches add up to it.

    Args:
        losses: (kept,) of each token.
        answer_lengths: (kept,) of each token the length of its answer.
        over: `tokens`, the mean of all tokens; `answers`, the mean over answers of the mean of their tokens (GRPO,
            https://arxiv.org/abs/2402.03300, equation 3); `most tokens`, the mean over answers of the sum over their
            tokens, divided by `max_tokens` (Dr. GRPO, https://arxiv.org/abs/2503.20783, appendix A).
        tokens: of the step, of all ranks.
        answers: of the step, of all ranks.
        max_tokens: that an answer may have.
    """
    if over == "tokens":
        return losses.sum() / tokens
    if over == "answers":
        return (losses / answer_lengths).sum() / answers
    return losses.sum() / (answers * max_tokens)
