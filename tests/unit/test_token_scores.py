"""Log-probabilities and entropies in chunks equal those of the whole, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from rayloom.train import token_scores as module
from rayloom.train.token_scores import token_scores


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_change_nothing(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    torch.manual_seed(0)
    logits = torch.randn(30, 50, requires_grad=True)
    labels = torch.randint(0, 50, (30,))
    log_probs, entropies = token_scores(logits, labels, temperature, entropy=True)
    whole = torch.distributions.Categorical(logits=logits.detach().double() / temperature)
    torch.testing.assert_close(log_probs.double(), whole.log_prob(labels), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropies.double(), whole.entropy(), rtol=1e-5, atol=1e-6)
    weights = torch.randn(30)
    (weights * log_probs + entropies).sum().backward()
    again = logits.detach().double().requires_grad_()
    exact = torch.distributions.Categorical(logits=again / temperature)
    (weights.double() * exact.log_prob(labels) + exact.entropy()).sum().backward()
    assert logits.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(logits.grad.double(), again.grad, rtol=1e-4, atol=1e-6)


def test_a_place_without_a_label_gives_nothing() -> None:
    log_probs, entropies = token_scores(torch.randn(2, 5), torch.tensor([-100, 3]), entropy=True)
    assert log_probs[0] == 0
    assert entropies[0] == 0
    assert log_probs[1] < 0 < entropies[1]
