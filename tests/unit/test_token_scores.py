"""Log-probabilities and entropies, of logits in chunks and of an output layer in parts of the vocabulary, equal those
of all logits at once in float64, in value and gradient."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from tests.tiny_model import small_model

from rayloom.models.value_head import attach_critic
from rayloom.models.wide_products import FrozenLinear
from rayloom.train import head_scores as parts
from rayloom.train import token_scores as chunks
from rayloom.train.batch import TrainedPositions
from rayloom.train.head_scores import Entropy, head_scores
from rayloom.train.token_scores import TokenScorer, TokenScores, logit_scores


def exact(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    distribution = torch.distributions.Categorical(logits=logits.double() / temperature)
    is_label = labels >= 0
    return distribution.log_prob(labels.clamp(min=0)) * is_label, distribution.entropy() * is_label


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_change_nothing(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK", 7)
    torch.manual_seed(0)
    logits = torch.randn(30, 50, requires_grad=True)
    labels = torch.randint(0, 50, (30,))
    log_probs, entropies = logit_scores(logits, labels, temperature, entropy="trained")
    again = logits.detach().double().requires_grad_()
    exact_log_probs, exact_entropies = exact(again, labels, temperature)
    torch.testing.assert_close(log_probs.double(), exact_log_probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropies.double(), exact_entropies, rtol=1e-5, atol=1e-6)
    weights = torch.randn(30)
    (weights * log_probs + entropies).sum().backward()
    (weights.double() * exact_log_probs + exact_entropies).sum().backward()
    assert logits.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(logits.grad.double(), again.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("entropy", ["none", "measured", "trained"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True])
def test_parts_of_the_vocabulary(
    entropy: Entropy, temperature: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_TILE", 16 * 7)  # the last one of 53 rows is smaller
    monkeypatch.setattr(parts, "_ROWS", 11)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 53, bias=bias).requires_grad_(False)
    hidden = (
        5 * torch.randn(30, 16)
    ).requires_grad_()  # some tokens are sure, so exponentials are of very unlike sizes
    labels = torch.randint(0, 53, (30,))
    labels[[3, 20]] = -100
    log_probs, entropies = head_scores(head, hidden, labels, temperature, entropy=entropy)
    again = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(again, head.weight.double(), head.bias.double() if bias else None)
    exact_log_probs, exact_entropies = exact(logits, labels, temperature)
    torch.testing.assert_close(log_probs.double(), exact_log_probs, rtol=1e-5, atol=2e-6)
    if entropy == "none":
        assert not entropies.any()
    else:
        torch.testing.assert_close(entropies.double(), exact_entropies, rtol=1e-5, atol=2e-6)
    weights = torch.randn(30)
    loss, exact_loss = (weights * log_probs).sum(), (weights.double() * exact_log_probs).sum()
    if entropy == "trained":
        loss, exact_loss = loss + (weights * entropies).sum(), exact_loss + (weights.double() * exact_entropies).sum()
    else:
        assert not entropies.requires_grad
    (3 * loss).backward()
    (3 * exact_loss).backward()
    assert hidden.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(hidden.grad.double(), again.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_16_bits_logits_are_rounded_as_the_layer_rounds_them(
    wide: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayloom.models.wide_products.float32_is_faster", lambda: wide)
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 200, bias=False).requires_grad_(False).to(torch.float32 if autocast else torch.bfloat16)
    head.__class__ = FrozenLinear
    hidden = torch.randn(80, 64).to(head.weight.dtype)
    labels = torch.randint(0, 200, (80,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = logit_scores(head(hidden), labels, entropy="measured")
        found = head_scores(head, hidden.bfloat16(), labels, entropy="measured")
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        # The product adds up in another order where it has other parts, and a few logits fall to the other side.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-2)
        assert (one - other).abs().median() < 1e-5


def model_with_critic() -> Any:
    torch.manual_seed(0)
    model = small_model("Llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    torch.nn.init.normal_(attach_critic(model).summary.weight)
    return model


@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_model_says_with_and_without_logits(autocast: bool) -> None:
    """A trained output layer is asked for its logits, a frozen one is not; both say the same, the critic too, and the
    adapter gets the same gradient."""
    ids = torch.arange(24).reshape(2, 12)
    positions = torch.tensor([0, 2, 5, 7, 13, 20, 22])
    batch = {"input_ids": ids, "positions": positions, "labels": (ids.flatten()[positions] + 1).unsqueeze(0)}
    found: list[tuple[TokenScores, list[torch.Tensor | None]]] = []
    for frozen in (True, False):
        model = model_with_critic()
        scorer = TokenScorer(model, TrainedPositions(model))
        model.get_output_embeddings().weight.requires_grad_(not frozen)
        shapes: list[torch.Size] = []
        model.get_output_embeddings().register_forward_hook(lambda *given, to=shapes: to.append(given[2].shape))
        within = torch.autocast("cpu", torch.bfloat16, enabled=autocast)  # as accelerate does: the forward pass only
        said = scorer(within(model), batch, temperature=0.8, entropy="measured")
        assert shapes == [(1, 7, 0 if frozen else model.config.vocab_size)]
        assert said.values is not None
        (said.log_probs.sum() + said.values.sum()).backward()
        found.append((said, [weight.grad for name, weight in model.named_parameters() if "lora" in name]))
        assert model(input_ids=ids).logits.shape[-1] == model.config.vocab_size  # only that pass had none
    (without, gradients), (with_logits, more_gradients) = found
    for name in ("log_probs", "entropies", "values"):
        torch.testing.assert_close(getattr(without, name), getattr(with_logits, name), rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, more_gradients, strict=True):
        assert one is not None
        assert other is not None
        assert (one - other).norm() <= (0.02 if autocast else 1e-5) * other.norm()


def test_a_place_without_a_label_gives_nothing() -> None:
    log_probs, entropies = logit_scores(torch.randn(2, 5), torch.tensor([-100, 3]), entropy="measured")
    assert log_probs[0] == 0
    assert entropies[0] == 0
    assert log_probs[1] < 0 < entropies[1]
