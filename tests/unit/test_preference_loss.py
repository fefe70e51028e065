"""Losses of preference training against their formulas, written out in plain float64, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayloom.losses.pairs import Pairs
from rayloom.losses.preference import LOSSES
from rayloom.stages.config import DpoConfig

FIELDS = ("chosen", "rejected", "reference_chosen", "reference_rejected")


def pairs_of(seed: int = 0, count: int = 4, *, reference: bool = True) -> Pairs:
    generator = torch.Generator().manual_seed(seed)

    def sums() -> torch.Tensor:
        return -20 * torch.rand(count, generator=generator, dtype=torch.float64) - 0.5

    tokens = [torch.randint(1, 30, (count,), generator=generator).double() for _ in range(2)]
    chosen, rejected, *others = (sums() for _ in range(4))
    return Pairs(chosen.requires_grad_(), rejected.requires_grad_(), *tokens, *(others if reference else ()))


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ls(x: float) -> float:
    return math.log(s(x))


def log_odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


# r, q: log-ratios of the chosen and the rejected answer; b: beta; o: what else an answer has, by its side.
Formula = Callable[..., float]
PLAIN: dict[str, tuple[dict[str, float], Formula]] = {
    "sigmoid": ({"label_smoothing": 0.2}, lambda r, q, b, o: -0.8 * ls(b * (r - q)) - 0.2 * ls(-b * (r - q))),
    "robust": ({"label_smoothing": 0.2}, lambda r, q, b, o: (-0.8 * ls(b * (r - q)) + 0.2 * ls(-b * (r - q))) / 0.6),
    "hinge": ({}, lambda r, q, b, o: max(0.0, 1 - b * (r - q))),
    "ipo": ({}, lambda r, q, b, o: (r / o["tw"] - q / o["tl"] - 1 / (2 * b)) ** 2),
    "kto_pair": ({}, lambda r, q, b, o: (1 - s(b * (r - o["zl"]))) / 2 + (1 - s(b * (o["zw"] - q))) / 2),
    "bco_pair": ({"shift": 0.3}, lambda r, q, b, o: -ls(b * r - 0.3) - ls(0.3 - b * q)),
    "apo_zero": ({}, lambda r, q, b, o: 1 - s(b * r) + s(b * q)),
    "apo_down": ({}, lambda r, q, b, o: s(b * r) + 1 - s(b * (r - q))),
    "sppo_hard": ({}, lambda r, q, b, o: (r - 1 / (2 * b)) ** 2 + (q + 1 / (2 * b)) ** 2),
    "nca_pair": ({}, lambda r, q, b, o: -ls(b * r) - 0.5 * ls(-b * r) - 0.5 * ls(-b * q)),
    "exo_pair": (
        {"label_smoothing": 0.1},
        lambda r, q, b, o: (
            s(b * (r - q)) * math.log(s(b * (r - q)) / 0.9) + s(-b * (r - q)) * math.log(s(-b * (r - q)) / 0.1)
        ),
    ),
    "discopop": (
        {"temperature": 0.5},
        lambda r, q, b, o: (
            -(1 - s(b * (r - q) / 0.5)) * ls(b * (r - q)) + s(b * (r - q) / 0.5) * math.exp(-b * (r - q))
        ),
    ),
    "cpo": ({}, lambda r, q, b, o: -ls(b * (o["w"] - o["l"]))),
    "simpo": ({"gamma": 0.7}, lambda r, q, b, o: -ls(b * (o["w"] / o["tw"] - o["l"] / o["tl"]) - 0.7)),
    "orpo": (
        {},
        lambda r, q, b, o: -o["w"] / o["tw"] - b * ls(log_odds(o["w"] / o["tw"]) - log_odds(o["l"] / o["tl"])),
    ),
}


def plain(name: str, pairs: Pairs, beta: float) -> list[float]:
    """The loss of each pair, by the formula."""
    w, v, a, c = (getattr(pairs, field).tolist() for field in FIELDS)
    tw, tl = pairs.chosen_tokens.tolist(), pairs.rejected_tokens.tolist()
    if name == "aot":
        policy = sorted(x - y for x, y in zip(w, v, strict=True))
        reference = sorted(x - y for x, y in zip(a, c, strict=True))
        return [-ls(beta * (x - y)) for x, y in zip(policy, reference, strict=True)]
    r, q = ([x - y for x, y in zip(one, other, strict=True)] for one, other in ((w, a), (v, c)))
    z = {"zw": max(0.0, sum(r) / len(r)), "zl": max(0.0, sum(q) / len(q))}
    rows = zip(r, q, w, v, tw, tl, strict=True)
    return [
        PLAIN[name][1](ri, qi, beta, {"w": wi, "l": li, "tw": twi, "tl": tli, **z}) for ri, qi, wi, li, twi, tli in rows
    ]


def test_every_loss_is_here():
    assert set(PLAIN) | {"aot"} == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
@given(seed=st.integers(0, 10**6), beta=st.floats(0.01, 1.0))
def test_the_formula(name: str, seed: int, beta: float):
    pairs = pairs_of(seed)
    losses = LOSSES[name](pairs, beta, **PLAIN.get(name, ({},))[0])
    assert losses.tolist() == pytest.approx(plain(name, pairs, beta), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"kto_pair"}))  # of that the next test tells
def test_the_gradient(name: str):
    """By small changes of each log-probability in the formula."""
    pairs, beta, step = pairs_of(3), 0.3, 1e-6
    LOSSES[name](pairs, beta, **PLAIN.get(name, ({},))[0]).sum().backward()

    def moved(field: str, index: int, by: float) -> float:
        values = getattr(pairs, field).detach().clone()
        values[index] += by
        parts = {one: getattr(pairs, one).detach() for one in (*FIELDS, "chosen_tokens", "rejected_tokens")}
        return sum(plain(name, Pairs(**(parts | {field: values})), beta))

    for field in ("chosen", "rejected"):
        for index in range(4):
            slope = (moved(field, index, step) - moved(field, index, -step)) / (2 * step)
            assert getattr(pairs, field).grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_the_divergence_is_held_constant():
    pairs, beta = pairs_of(5), 0.3
    LOSSES["kto_pair"](pairs, beta).sum().backward()
    chosen, rejected = (ratio.detach() for ratio in pairs.ratios)
    inside = torch.sigmoid(beta * (chosen - rejected.mean().clamp(min=0)))
    torch.testing.assert_close(pairs.chosen.grad, -beta * inside * (1 - inside) / 2)


def has_reference(name: str) -> bool:
    """What the job's config says of it."""
    return DpoConfig.model_validate({"loss": name}).has_reference


@pytest.mark.parametrize("name", LOSSES)
def test_what_needs_a_reference(name: str):
    pairs = pairs_of(reference=False)
    if not has_reference(name):
        assert LOSSES[name](pairs, 0.1).isfinite().all()
        return
    with pytest.raises(ValueError, match="needs the log-probabilities of a reference"):
        LOSSES[name](pairs, 0.1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("far", [1e-7, 300.0])
def test_finite_at_the_ends(name: str, far: float):
    """Answers that are nearly certain, and answers that are nearly impossible."""
    values: list[Any] = [torch.tensor([-far, -2.0]), torch.tensor([-2.0, -far])]
    chosen, rejected = (value.requires_grad_() for value in values)
    one = torch.ones(2)
    pairs = Pairs(chosen, rejected, one, one, torch.full((2,), -2.0), torch.full((2,), -2.0))
    losses = LOSSES[name](pairs, 0.1)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"discopop"}))  # which rises from 0 before it falls: figure 2
def test_they_prefer_the_chosen_answer(name: str):
    reference = torch.full((1,), -5.0, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    equal = Pairs(reference, reference, one, one, reference, reference)
    better = Pairs(reference + 0.1, reference - 0.1, one, one, reference, reference)
    function = LOSSES[name]
    assert function(better, 0.1).item() < function(equal, 0.1).item()
