"""The losses of reward models and of judged answers against their formulas in plain float64, gradients included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayloom.losses.judgement import kto
from rayloom.losses.reward import bradley_terry

NUMBERS = st.lists(st.floats(-30, 30), min_size=4, max_size=4)


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def numbers(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@given(chosen=NUMBERS, rejected=NUMBERS, center=st.sampled_from([0.0, 0.3]))
def test_rewards(chosen, rejected, center):
    w, v = numbers(chosen), numbers(rejected)
    losses = bradley_terry(w, v, center=center)
    plain = [-math.log(s(a - b)) + center * (a + b) ** 2 for a, b in zip(chosen, rejected, strict=True)]
    assert losses.tolist() == pytest.approx(plain, rel=1e-9, abs=1e-9)
    losses.sum().backward()
    slopes = [2 * center * (a + b) - s(b - a) for a, b in zip(chosen, rejected, strict=True)]
    assert w.grad.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-9)


@given(ratios=NUMBERS, divergence=st.floats(0, 10), beta=st.floats(0.01, 1.0))
def test_judgements(ratios, divergence, beta):
    good = [True, False, True, False]
    r = numbers(ratios)
    losses = kto(r, torch.tensor(good), divergence, beta, desirable_weight=1.5, undesirable_weight=0.5)
    plain = [
        1.5 * (1 - s(beta * (x - divergence))) if is_good else 0.5 * (1 - s(beta * (divergence - x)))
        for x, is_good in zip(ratios, good, strict=True)
    ]
    assert losses.tolist() == pytest.approx(plain, rel=1e-9, abs=1e-12)
    losses.sum().backward()
    inside = [s(beta * (x - divergence)) for x in ratios]
    slopes = [(-1.5 if is_good else 0.5) * beta * p * (1 - p) for p, is_good in zip(inside, good, strict=True)]
    assert r.grad.tolist() == pytest.approx(slopes, rel=1e-7, abs=1e-12)


def test_far_ends_are_finite():
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = bradley_terry(far, -far) + kto(far, torch.tensor([True, False]), 0.0, 1.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert far.grad.isfinite().all()
