"""What each token of an answer was worth. Tables are (answers, width); `mask` says where an answer has tokens, from the
left. No gradient passes through any of this."""

from __future__ import annotations

import torch

from rayloom.losses.moments import Moments

_EPSILON = 1e-4
"""Added to deviations, as in DeepSeek's and TRL's GRPO."""


def token_rewards(rewards: torch.Tensor, penalties: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(answers, width): the answer's reward at its last token, less each token's penalty (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, equation 2).

    Args:
        rewards: (answers,)
        penalties: (answers, width) what the divergence from the reference costs.
    """
    table = -penalties * mask
    last = mask.sum(1) - 1
    rows = (last >= 0).nonzero().squeeze(1)
    table[rows, last[rows]] += rewards[rows].to(table.dtype)
    return table


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, https://arxiv.org/abs/1506.02438, equation 16).

    Behind an answer's last token there is nothing to come: its value is 0.

    Args:
        rewards: (answers, width) of each token.
        values: (answers, width) of the state before each token.

    Returns:
        advantages and returns, (answers, width); returns are what values should have been.
    """
    advantages = torch.zeros_like(rewards)
    after = torch.zeros(len(rewards), dtype=rewards.dtype, device=rewards.device)
    next_value = torch.zeros_like(after)
    for step in reversed(range(rewards.shape[1])):
        is_token = mask[:, step]
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        after = torch.where(is_token, delta + gamma * gae_lambda * after, 0.0)
        next_value = torch.where(is_token, values[:, step], 0.0)
        advantages[:, step] = after
    return advantages, (advantages + values) * mask


def discounted_returns(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """(answers, width): of each token the rewards from it on, those k tokens later times gamma^k."""
    returns = torch.zeros_like(rewards)
    after = torch.zeros(len(rewards), dtype=rewards.dtype, device=rewards.device)
    for step in reversed(range(rewards.shape[1])):
        after = torch.where(mask[:, step], rewards[:, step] + gamma * after, 0.0)
        returns[:, step] = after
    return returns


def group_relative(rewards: torch.Tensor, groups: torch.Tensor, *, scale: bool) -> torch.Tensor:
    """(answers,): the reward less the mean of its group; with `scale` over the group's deviation (GRPO,
    https://arxiv.org/abs/2402.03300, section 4.1.2), without as Dr. GRPO has it (https://arxiv.org/abs/2503.20783).

    Args:
        groups: (answers,) whole numbers; answers to one prompt have one.
    """
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(count), dtype=rewards.dtype).index_add_(0, index, rewards) / count
    centred = rewards - means[index]
    if not scale:
        return centred
    squares = torch.zeros(len(count), dtype=rewards.dtype).index_add_(0, index, centred.square())
    deviations = (squares / (count - 1).clamp(min=1)).sqrt()
    return centred / (deviations[index] + _EPSILON)


def leave_one_out(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(answers,): the reward less the mean of the others of its group (RLOO, https://arxiv.org/abs/2402.14740, equation
    8). Of a group of one it is 0."""
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(count), dtype=rewards.dtype).index_add_(0, index, rewards)
    others = (count[index] - 1).to(rewards.dtype)
    return torch.where(others > 0, rewards - (sums[index] - rewards) / others.clamp(min=1), 0.0)


def moments_of(table: torch.Tensor, mask: torch.Tensor) -> Moments:
    """Of what the mask chooses; ranks merge theirs."""
    values = table[mask].double()
    if not len(values):
        return Moments()
    mean = values.mean()
    return Moments(float(len(values)), float(mean), float((values - mean).square().sum()))


def whiten(table: torch.Tensor, mask: torch.Tensor, moments: Moments) -> torch.Tensor:
    """The table with mean 0 and deviation 1, 0 outside of the mask.

    Args:
        moments: of all ranks' tables.
    """
    return ((table.double() - moments.mean) / (moments.deviation + 1e-8) * mask).to(table.dtype)
