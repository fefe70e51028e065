"""The learning rate against transformers' own schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from rayloom.train.schedule import learning_rate_factor

SCHEDULERS = ("cosine", "linear", "constant")


def transformers_factor(scheduler: str, warmup: int, total: int) -> Callable[[int], float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    if scheduler == "constant":
        return get_constant_schedule_with_warmup(optimizer, warmup).lr_lambdas[0]
    get = get_cosine_schedule_with_warmup if scheduler == "cosine" else get_linear_schedule_with_warmup
    return get(optimizer, warmup, total).lr_lambdas[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 1, 3, 10])
def test_it_is_transformers_schedule_of_the_share_that_is_done(scheduler, warmup):
    total = 40
    expected = transformers_factor(scheduler, warmup, total)
    for step in range(total + 1):
        factor = learning_rate_factor(step / total, scheduler, warmup / total)
        assert factor == pytest.approx(expected(step), abs=1e-12), step


def test_golden():
    assert learning_rate_factor(0.05, "cosine", 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(0.1, "cosine", 0.1) == 1.0
    assert learning_rate_factor(0.1 + 0.9 / 3, "cosine", 0.1) == pytest.approx(0.75)  # (1 + cos 60 degrees) / 2
    assert learning_rate_factor(0.55, "cosine", 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(0.55, "linear", 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(0.55, "constant", 0.1) == 1.0
    assert learning_rate_factor(0.0, "constant", 0.0) == 1.0


@given(progress=st.floats(0, 1.5), warmup=st.floats(0, 1, exclude_max=True), scheduler=st.sampled_from(SCHEDULERS))
def test_it_is_a_share_and_falls_only_behind_the_warm_up(progress, warmup, scheduler):
    factor = learning_rate_factor(progress, scheduler, warmup)
    assert 0 <= factor <= 1
    later = learning_rate_factor(math.nextafter(progress, 2), scheduler, warmup)
    if math.nextafter(progress, 2) < warmup:
        assert later >= factor
    elif progress >= warmup:
        assert later <= factor + 1e-12


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_the_end_is_zero_and_stays_zero(scheduler):
    assert learning_rate_factor(1.0, scheduler, 0.03) == 0.0
    assert learning_rate_factor(1.01, scheduler, 0.03) == 0.0  # a last step may reach beyond the end


def test_an_unknown_scheduler():
    with pytest.raises(ValueError, match="unknown scheduler 'cosin'"):
        learning_rate_factor(0.5, "cosin", 0.0)
