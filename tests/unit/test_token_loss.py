"""Losses of supervised fine-tuning against their formulas in float64, gradients included."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import LabelSmoother

from rayloom.config.job import JobConfig
from rayloom.losses.token import cross_entropy, dft, eaft
from rayloom.stages.step_loss import step_loss, token_loss

VOCABULARY = 31


def case(tokens: int = 6, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(tokens, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(VOCABULARY, (tokens,), generator=generator)


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.detach().exp() / logits.detach().exp().sum(-1, keepdim=True)


def weights_of(name: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What each token's negative log-likelihood is multiplied by."""
    p = probabilities(logits)
    if name == "dft":
        return p[range(len(labels)), labels]
    if name == "cross_entropy":
        return torch.ones(len(labels), dtype=torch.float64)
    rows = []
    for row in p:
        best = sorted(row.tolist(), reverse=True)[:20]
        share = [one / sum(best) for one in best]
        rows.append(-sum(one * math.log(one) for one in share) / math.log(20))
    return torch.tensor(rows, dtype=torch.float64) ** (0.7 if name == "eaft 0.7" else 1.0)


LOSSES = {
    "cross_entropy": cross_entropy,
    "dft": dft,
    "eaft": eaft,
    "eaft 0.7": lambda logits, labels: eaft(logits, labels, alpha=0.7),
}


@pytest.mark.parametrize("name", LOSSES)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 8.0))
def test_loss_and_gradient(name, seed, scale):
    logits, labels = case(seed=seed, scale=scale)
    weights, p = weights_of(name, logits, labels), probabilities(logits)
    losses = LOSSES[name](logits, labels)
    expected = -weights * p[range(len(labels)), labels].log()
    torch.testing.assert_close(losses.detach(), expected, atol=1e-9, rtol=1e-9)
    losses.sum().backward()
    hot = torch.nn.functional.one_hot(labels, VOCABULARY)
    torch.testing.assert_close(logits.grad, weights[:, None] * (p - hot), atol=1e-9, rtol=1e-9)


def test_label_smoothing():
    logits, labels = case()
    losses = cross_entropy(logits, labels, label_smoothing=0.2)
    log_p = probabilities(logits).log()
    expected = -0.8 * log_p[range(6), labels] - 0.2 * log_p.mean(-1)
    torch.testing.assert_close(losses.detach(), expected, atol=1e-12, rtol=1e-12)
    theirs = LabelSmoother(0.2)({"logits": logits[None]}, labels[None])
    torch.testing.assert_close(losses.mean(), theirs, atol=1e-6, rtol=1e-6)  # theirs adds up in float32


@pytest.mark.parametrize("name", LOSSES)
def test_what_has_no_label_counts_nothing(name):
    logits, labels = case()
    labels[2] = -100
    losses = LOSSES[name](logits, labels)
    losses.sum().backward()
    assert losses[2] == 0
    assert not logits.grad[2].any()
    assert losses[torch.tensor([0, 1, 3, 4, 5])].all()


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name):
    logits = torch.tensor([[1e4] + [0.0] * 30, [-1e4] + [0.0] * 30], dtype=torch.bfloat16, requires_grad=True)
    losses = LOSSES[name](logits, torch.tensor([1, 0]))
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


def test_a_vocabulary_below_twenty_tokens():
    logits = torch.zeros(1, 8, dtype=torch.float64)
    torch.testing.assert_close(eaft(logits, torch.tensor([3])), torch.tensor([math.log(8)], dtype=torch.float64))


def test_alpha_zero_is_cross_entropy():
    logits, labels = case()
    torch.testing.assert_close(eaft(logits, labels, alpha=0.0), cross_entropy(logits, labels))


def test_a_batch_gives_its_share_of_the_steps_mean():
    logits, labels = case()
    outputs = SimpleNamespace(logits=logits[None], aux_loss=torch.tensor(3.0, dtype=torch.float64))
    share = step_loss(dft, 0.5)(outputs, labels[None], num_items_in_batch=torch.tensor(10))
    torch.testing.assert_close(share, dft(logits, labels).sum() / 10 + 1.5)


def stage_of(**stage: object) -> object:
    document = {"name": "a", "model": {"path": "m"}, "data": {"train": ["x.jsonl"]}, "stage": stage}
    return JobConfig.model_validate(document).stage


def test_the_config_chooses():
    logits, labels = case()
    assert token_loss(stage_of()) is None  # the model's own
    assert token_loss(stage_of(type="pretrain")) is None
    assert token_loss(stage_of(loss="dft")) is dft
    smoothed, adaptive = token_loss(stage_of(label_smoothing=0.2)), token_loss(stage_of(loss="eaft", eaft_alpha=0.7))
    assert torch.equal(smoothed(logits, labels), cross_entropy(logits, labels, label_smoothing=0.2))
    assert torch.equal(adaptive(logits, labels), eaft(logits, labels, alpha=0.7))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"loss": "dft", "label_smoothing": 0.1}, "label_smoothing is for loss cross_entropy, not dft"),
        ({"eaft_alpha": 2.0}, "eaft_alpha is for loss eaft, not cross_entropy"),
        ({"label_smoothing": 1.0}, "less than 1"),
        ({"loss": "focal"}, "cross_entropy"),
    ],
)
def test_what_is_refused(stage, message):
    with pytest.raises(ValueError, match=message):
        stage_of(**stage)
