"""Losses of policy optimization against their formulas, written out in float64, token by token; gradients by
differences."""

from __future__ import annotations

import math

import pytest
import torch

from rayloom.losses.policy import (
    clipped_policy_loss,
    clipped_share,
    clipped_value_loss,
    importance_weights,
    kl_estimate,
    mean_over,
)

torch.manual_seed(0)
TOKENS = 40
NEW, OLD, ENGINE = (torch.randn(TOKENS, dtype=torch.float64) * 0.6 - 2 for _ in range(3))
ADVANTAGES = torch.randn(TOKENS, dtype=torch.float64)


def one_policy_loss(new: float, old: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    ratio = math.exp(new - old)
    bounded = min(max(ratio, 1 - low), 1 + high)
    objective = min(ratio * advantage, bounded * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


@pytest.mark.parametrize(("high", "dual"), [(None, None), (0.28, None), (None, 1.5), (0.4, 3.0)])
def test_the_clipped_loss_is_its_formula(high: float | None, dual: float | None) -> None:
    found = clipped_policy_loss(NEW, OLD, ADVANTAGES, clip=0.2, clip_high=high, dual_clip=dual)
    triples = zip(NEW.tolist(), OLD.tolist(), ADVANTAGES.tolist(), strict=True)
    expected = [one_policy_loss(*triple, 0.2, 0.2 if high is None else high, dual) for triple in triples]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    if dual == 1.5:  # else the bound would not be seen
        plain = clipped_policy_loss(NEW, OLD, ADVANTAGES, clip=0.2, clip_high=high)
        assert (found < plain).any()


def test_gradients_of_the_losses() -> None:
    new = NEW.clone().requires_grad_()
    losses = [
        lambda x: clipped_policy_loss(x, OLD, ADVANTAGES, clip=0.2, dual_clip=1.5),
        lambda x: clipped_value_loss(x, OLD, ENGINE, 0.3),
        *(lambda x, name=name: kl_estimate(x, OLD, name) for name in ("k1", "k2", "k3")),
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(loss, (new,))


@pytest.mark.parametrize("dual", [None, 1.5])
def test_what_is_clipped_has_no_gradient(dual: float | None) -> None:
    new = NEW.clone().requires_grad_()
    clipped_policy_loss(new, OLD, ADVANTAGES, clip=0.2, clip_high=0.4, dual_clip=dual).sum().backward()
    share = clipped_share(NEW, OLD, ADVANTAGES, clip=0.2, clip_high=0.4, dual_clip=dual)
    far = (NEW - OLD).exp() > 1.5
    assert bool(share[far & (ADVANTAGES < 0)].any()) == (dual is not None)
    assert 0 < share.sum() < TOKENS
    assert torch.equal(new.grad == 0, share == 1)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_loss_is_its_formula(clip: float | None) -> None:
    found = clipped_value_loss(NEW, OLD, ENGINE, clip).tolist()
    for one, new, old, goal in zip(found, NEW.tolist(), OLD.tolist(), ENGINE.tolist(), strict=True):
        errors = [(new - goal) ** 2]
        if clip is not None:
            errors.append((old + min(max(new - old, -clip), clip) - goal) ** 2)
        assert one == pytest.approx(0.5 * max(errors), rel=1e-12)


def test_importance_weights_are_truncated_and_have_no_gradient() -> None:
    weights = importance_weights(OLD.clone().requires_grad_(), ENGINE, 1.5)
    expected = [min(1.5, math.exp(old - engine)) for old, engine in zip(OLD.tolist(), ENGINE.tolist(), strict=True)]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert not weights.requires_grad
    assert (weights == 1.5).any()
    assert (weights < 1.5).any()


def test_estimates_of_the_divergence() -> None:
    """k1 and k3, weighted with the probabilities of all tokens, are the divergence itself."""
    p, q = (torch.randn(50, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    for name in ("k1", "k3"):
        assert float((p.exp() * kl_estimate(p, q, name)).sum()) == pytest.approx(exact, rel=1e-10)
    assert (kl_estimate(p, q, "k3") >= 0).all()
    assert (kl_estimate(p, q, "k2") >= 0).all()
    assert torch.equal(kl_estimate(p, q, "k2"), (p - q) ** 2 / 2)


def test_gradients_of_the_estimates_on_policy() -> None:
    """Weighted with the probabilities of all tokens: k2's is the divergence's own, k3's that of the reverse, k1's 0."""
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    q = torch.randn(50, dtype=torch.float64).log_softmax(0)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(value, logits, retain_graph=True)
        return found

    p = logits.log_softmax(0)
    mean = {name: gradient((p.detach().exp() * kl_estimate(p, q, name)).sum()) for name in ("k1", "k2", "k3")}
    torch.testing.assert_close(mean["k1"], torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(mean["k2"], gradient((p.exp() * (p - q)).sum()), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mean["k3"], gradient((q.exp() * (q - p)).sum()), rtol=1e-9, atol=1e-12)


LENGTHS = [5, 1, 9, 3, 7, 15]


@pytest.mark.parametrize("over", ["tokens", "answers", "most tokens"])
def test_parts_of_a_step_add_up_to_its_mean(over: str) -> None:
    """However answers fall into ranks and micro-batches."""
    answers = list(torch.randn(sum(LENGTHS), dtype=torch.float64).split(LENGTHS))
    if over == "tokens":
        expected = sum(float(a.sum()) for a in answers) / sum(LENGTHS)
    elif over == "answers":
        expected = sum(float(a.sum()) / len(a) for a in answers) / len(answers)
    else:
        expected = sum(float(a.sum()) for a in answers) / (len(answers) * 20)
    totals = {"tokens": sum(LENGTHS), "answers": len(answers), "max_tokens": 20}
    for parts in ([[0, 1, 2, 3, 4, 5]], [[0, 1], [2], [3, 4, 5]], [[n] for n in range(6)]):
        found = 0.0
        for part in parts:
            losses = torch.cat([answers[n] for n in part])
            lengths = torch.cat([torch.full((LENGTHS[n],), float(LENGTHS[n]), dtype=torch.float64) for n in part])
            found += float(mean_over(losses, lengths, over, **totals))  # type: ignore[arg-type]
        assert found == pytest.approx(expected, rel=1e-12)
