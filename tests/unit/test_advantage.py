"""Advantages against loops in plain Python floats, and TRL's formulas where it has them."""

from __future__ import annotations

import math
from functools import reduce

import pytest
import torch

from rayloom.losses.advantage import (
    discounted_returns,
    gae,
    group_relative,
    leave_one_out,
    moments_of,
    token_rewards,
    whiten,
)
from rayloom.losses.kl_control import KlControl
from rayloom.losses.moments import Moments

LENGTHS = [4, 1, 6, 3, 0, 6]
WIDTH = 6
MASK = torch.arange(WIDTH) < torch.tensor(LENGTHS).unsqueeze(1)
torch.manual_seed(1)
VALUES, REWARDS = (torch.randn(len(LENGTHS), WIDTH, dtype=torch.float64) * MASK for _ in range(2))


def test_the_reward_is_at_the_last_token_and_every_token_pays() -> None:
    rewards, penalties = torch.arange(6, dtype=torch.float64) + 1, torch.rand(6, WIDTH, dtype=torch.float64)
    found = token_rewards(rewards, penalties, MASK)
    for row, length in enumerate(LENGTHS):
        expected = [-float(penalties[row, n]) for n in range(length)] + [0.0] * (WIDTH - length)
        if length:
            expected[length - 1] += row + 1
        assert found[row].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0)])
def test_gae_is_the_sum_of_discounted_errors(gamma: float, lam: float) -> None:
    """Equation 16 as it stands, a double loop, not the recursion."""
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=gamma, gae_lambda=lam)
    for row, length in enumerate(LENGTHS):
        rewards, values = REWARDS[row].tolist(), [*VALUES[row].tolist()[:length], 0.0]
        errors = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
        for t in range(WIDTH):
            expected = sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, length)) if t < length else 0.0
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-12)
            assert float(returns[row, t]) == pytest.approx(expected + (values[t] if t < length else 0.0), abs=1e-12)


def test_with_lambda_1_returns_are_the_rewards_that_follow() -> None:
    _, returns = gae(REWARDS, VALUES, MASK, gamma=0.9, gae_lambda=1.0)
    torch.testing.assert_close(returns, discounted_returns(REWARDS, MASK, 0.9), rtol=1e-12, atol=1e-12)


def test_returns_are_discounted() -> None:
    found = discounted_returns(REWARDS, MASK, 0.8)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            expected = sum(0.8 ** (k - t) * float(REWARDS[row, k]) for k in range(t, length))
            assert float(found[row, t]) == pytest.approx(expected, abs=1e-12)
        assert found[row, length:].tolist() == [0.0] * (WIDTH - length)


GROUPS = torch.tensor([7, 7, 3, 7, 3, 9])
OF_ANSWERS = torch.tensor([1.0, 2.0, 5.0, 6.0, -1.0, 4.0], dtype=torch.float64)


def members(group: int) -> list[float]:
    return [float(r) for r, g in zip(OF_ANSWERS, GROUPS, strict=True) if g == group]


@pytest.mark.parametrize("scale", [True, False])
def test_group_relative_is_its_formula(scale: bool) -> None:
    found = group_relative(OF_ANSWERS, GROUPS, scale=scale)
    for one, reward, group in zip(found.tolist(), OF_ANSWERS.tolist(), GROUPS.tolist(), strict=True):
        own = members(group)
        mean = sum(own) / len(own)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in own) / max(1, len(own) - 1))
        expected = (reward - mean) / (deviation + 1e-4) if scale else reward - mean
        assert one == pytest.approx(expected, abs=1e-12)


def test_group_relative_is_what_trl_computes() -> None:
    """TRL 1.16, `GRPOTrainer._generate_and_score_completions`: rewards of groups of equal size, as rows."""
    rewards = torch.randn(5, 4, dtype=torch.float64)
    theirs = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
    ours = group_relative(rewards.flatten(), torch.arange(5).repeat_interleave(4), scale=True)
    torch.testing.assert_close(ours, theirs.flatten(), rtol=1e-12, atol=1e-12)


def test_leave_one_out_compares_with_the_others() -> None:
    found = leave_one_out(OF_ANSWERS, GROUPS)
    for one, reward, group in zip(found.tolist(), OF_ANSWERS.tolist(), GROUPS.tolist(), strict=True):
        own = members(group)
        expected = reward - (sum(own) - reward) / (len(own) - 1) if len(own) > 1 else 0.0
        assert one == pytest.approx(expected, abs=1e-12)


def test_whitening_is_over_all_ranks_tokens() -> None:
    parts = [(REWARDS[:2], MASK[:2]), (REWARDS[2:], MASK[2:])]
    moments = reduce(Moments.merged, (moments_of(*part) for part in parts))
    found = torch.cat([whiten(*part, moments) for part in parts])
    tokens = REWARDS[MASK]
    expected = (tokens - tokens.mean()) / tokens.std(unbiased=False)
    torch.testing.assert_close(found[MASK], expected, rtol=1e-6, atol=1e-6)
    assert (found[~MASK] == 0).all()
    assert float(found[MASK].mean()) == pytest.approx(0, abs=1e-9)


def test_whitening_keeps_the_digits_of_numbers_far_from_zero() -> None:
    """A deviation of 1 about 1e8: in sums of squares it is below the last digit of float64."""
    near = torch.tensor([[-1.5, -0.5, 0.5, 1.5], [2.0, -2.0, 1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(2, 4, dtype=torch.bool)
    expected = near / near.std(unbiased=False)
    far = near + 1e8
    moments = reduce(Moments.merged, (moments_of(far[row : row + 1], mask[:1]) for row in range(2)))
    torch.testing.assert_close(whiten(far, mask, moments), expected, rtol=1e-6, atol=1e-6)
    assert moments.merged(moments_of(far, ~mask)) == moments  # a rank without answers


def test_the_coefficient_follows_its_target() -> None:
    control = KlControl(0.1, target=6.0, horizon=1000)
    assert control.after(6.0, 50) == control
    assert control.after(6.6, 50).coefficient == pytest.approx(0.1 * (1 + 0.1 * 50 / 1000))
    assert control.after(100.0, 50).coefficient == pytest.approx(0.1 * (1 + 0.2 * 50 / 1000))
    assert control.after(0.0, 50).coefficient == pytest.approx(0.1 * (1 - 0.2 * 50 / 1000))
    assert control.after(0.0, 64_000).coefficient == pytest.approx(0.1 * 0.8)  # more answers than the horizon
    assert KlControl(0.1).after(100.0, 50).coefficient == 0.1
    assert KlControl(**control.as_dict()) == control
