"""The loss of a step of stage ppo against the whole formula, written out in float64, token by token: every term alone
and all at once; gradients by differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rayloom.losses.policy import importance_weights
from rayloom.stages.ppo_config import PpoConfig
from rayloom.train.ppo_loss import Totals, step_loss
from rayloom.train.token_scores import TokenScores, logit_scores

LENGTHS = [9, 1, 17, 13]
TOKENS, MOST, COEFFICIENT = sum(LENGTHS), 20, 0.7
TOTALS = Totals(answers=7, tokens=90, all_tokens=200)
"""More than is in the batch: other ranks and micro-batches have the rest."""
LENGTH_OF = [length for length in LENGTHS for _ in range(length)]
_GENERATOR = torch.Generator().manual_seed(0)


def numbers(spread: float, middle: float = 0.0) -> torch.Tensor:
    return torch.randn(TOKENS, dtype=torch.float64, generator=_GENERATOR) * spread + middle


OLD, ENGINE, REFERENCE = numbers(0.6, -2.0), numbers(0.6, -2.0), numbers(0.6, -2.0)
NEW, VALUES, OLD_VALUES = OLD + numbers(0.6), numbers(1.0), numbers(1.0)
ADVANTAGES, RETURNS = numbers(1.0), numbers(1.0)
ENTROPIES = numbers(0.3, 2.0).abs()

OFF: dict[str, Any] = {"kl": {"coefficient": 0.0}, "importance_cap": None}
GAE = {**OFF, "advantage": "gae", "value_weight": 0.0}
ALL: dict[str, Any] = {
    "advantage": "gae",
    "clip": 0.1,
    "clip_high": 0.3,
    "dual_clip": 1.5,
    "value_weight": 0.4,
    "value_clip": 0.3,
    "entropy": 0.2,
    "importance_cap": 1.2,
    "kl": {"place": "loss"},
}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "policy": ({**OFF, "advantage": "reinforce++"}, True),
    "policy with all clips": ({**OFF, "advantage": "rloo", "clip": 0.1, "clip_high": 0.3, "dual_clip": 1.5}, True),
    "policy as grpo has it": ({**OFF, "advantage": "grpo"}, True),
    "policy as dr_grpo has it": ({**OFF, "advantage": "dr_grpo"}, True),
    "importance": ({**OFF, "advantage": "reinforce++", "importance_cap": 1.2}, True),
    "value": ({**GAE, "value_weight": 0.4, "value_clip": None}, False),
    "value with its clip": ({**GAE, "value_weight": 0.4, "value_clip": 0.3}, False),
    "entropy": ({**GAE, "entropy": 0.2}, False),
    "divergence k2": ({**GAE, "kl": {"place": "loss", "estimator": "k2"}}, False),
    "divergence k3": ({**GAE, "kl": {"place": "loss"}}, False),
    "divergence as grpo has it": ({**OFF, "advantage": "grpo", "kl": {}}, False),
    "divergence that the rewards have": ({**OFF, "advantage": "rloo", "kl": {}}, True),
    "all": (ALL, True),
    "all as grpo has it": ({**ALL, "advantage": "grpo"}, True),
    "all as dr_grpo has it": ({**ALL, "advantage": "dr_grpo"}, True),
}
"""The stage, and whether there are advantages: without, the policy's own loss is 0."""


def known(stage: PpoConfig, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `Experience.known` has in such a stage."""
    tables = {"old_log_probs": OLD, "advantages": advantages, "lengths": torch.tensor(LENGTH_OF).double()}
    if stage.has_reference:
        tables["reference"] = REFERENCE
    if stage.has_value_head:
        tables |= {"old_values": OLD_VALUES, "returns": RETURNS}
    if stage.importance_cap is not None:
        tables["importance"] = importance_weights(OLD, ENGINE, stage.importance_cap)
    return tables


def parts_of(stage: PpoConfig, n: int, advantage: float, new: float, entropy: float, value: float) -> dict[str, float]:
    """What each term gives token `n`, without its weight."""
    old, reference, old_value, goal = OLD[n].item(), REFERENCE[n].item(), OLD_VALUES[n].item(), RETURNS[n].item()
    ratio = math.exp(new - old)
    high = stage.clip if stage.clip_high is None else stage.clip_high
    objective = min(ratio * advantage, min(max(ratio, 1 - stage.clip), 1 + high) * advantage)
    if stage.dual_clip is not None and advantage < 0:
        objective = max(objective, stage.dual_clip * advantage)
    if stage.importance_cap is not None:
        objective *= min(stage.importance_cap, math.exp(old - ENGINE[n].item()))
    parts = {"policy": -objective, "entropy": entropy, "value": 0.0, "divergence": 0.0}
    if stage.advantage == "gae":
        errors = [(value - goal) ** 2]
        if stage.value_clip is not None:
            errors.append((old_value + min(max(value - old_value, -stage.value_clip), stage.value_clip) - goal) ** 2)
        parts["value"] = max(errors) / 2
    is_in_loss = stage.kl.place == "loss" or (stage.kl.place == "auto" and stage.advantage in ("grpo", "dr_grpo"))
    if stage.kl.coefficient and is_in_loss:
        r = new - reference
        parts["divergence"] = r * r / 2 if stage.kl.estimator == "k2" else math.exp(-r) - 1 + r
    return parts


def formula(stage: PpoConfig, advantages: list[float], *said: list[float]) -> float:
    """The whole: policy + value_weight * value + coefficient * divergence - entropy * entropy, as a mean over the
    step's tokens, over its answers of the mean of each, or over its answers of the sum of each over the most tokens."""
    total = 0.0
    for n, (advantage, *of_token) in enumerate(zip(advantages, *said, strict=True)):
        parts = parts_of(stage, n, advantage, *of_token)
        loss = parts["policy"] + stage.value_weight * parts["value"] + COEFFICIENT * parts["divergence"]
        loss -= stage.entropy * parts["entropy"]
        if stage.advantage == "grpo":
            total += loss / LENGTH_OF[n] / TOTALS.answers
        elif stage.advantage == "dr_grpo":
            total += loss / (TOTALS.answers * MOST)
        else:
            total += loss / TOTALS.tokens
    return total


def said_by() -> list[torch.Tensor]:
    """Log-probabilities, entropies and values of a model that trains."""
    return [one.clone().requires_grad_() for one in (NEW, ENTROPIES, VALUES)]


def found(stage: PpoConfig, advantages: torch.Tensor, said: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    new, entropies, values = said
    scores = TokenScores(new, entropies, values if stage.has_value_head else None)
    tables = known(stage, advantages)
    return step_loss(scores, tables, stage, TOTALS, max_tokens=MOST, kl_coefficient=COEFFICIENT)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradients_are_the_formulas(case: str) -> None:
    given, has_advantages = CASES[case]
    stage = PpoConfig.model_validate(given)
    advantages = ADVANTAGES if has_advantages else torch.zeros_like(ADVANTAGES)
    said = said_by()
    loss, _ = found(stage, advantages, said)
    plain = [one.tolist() for one in said]
    assert loss.item() == pytest.approx(formula(stage, advantages.tolist(), *plain), rel=1e-12)
    assert abs(loss.item()) > 1e-3
    loss.backward()
    step = 1e-6
    for one, numbers_of_it in zip(said, plain, strict=True):
        for n, number in enumerate(numbers_of_it):
            ends = []
            for sign in (1, -1):
                numbers_of_it[n] = number + sign * step
                ends.append(formula(stage, advantages.tolist(), *plain))
            numbers_of_it[n] = number
            slope = 0.0 if one.grad is None else one.grad[n].item()
            assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8), (case, n)


def test_the_cases_reach_every_branch() -> None:
    """Else a term could be wrong where no number of the cases comes: both clips, the third one, both kinds of weight,
    values within and beyond their clip."""
    ratios, weights = (NEW - OLD).exp(), (OLD - ENGINE).exp()
    gone = (VALUES - OLD_VALUES).abs()
    for there in (
        (ADVANTAGES > 0) & (ratios > 1.3),
        (ADVANTAGES < 0) & (ratios < 0.9),
        (ADVANTAGES < 0) & (ratios > 1.5),
        (ratios > 0.9) & (ratios < 1.3),
        weights > 1.2,
        weights < 1.2,
        gone > 0.3,
        gone < 0.3,
    ):
        assert there.any()


def test_what_is_measured_is_each_part() -> None:
    stage = PpoConfig.model_validate(ALL)
    _, measures = found(stage, ADVANTAGES, said_by())
    rows = zip(ADVANTAGES.tolist(), NEW.tolist(), ENTROPIES.tolist(), VALUES.tolist(), strict=True)
    parts = [parts_of(stage, n, *row) for n, row in enumerate(rows)]
    assert measures["policy_loss"].tolist() == pytest.approx([part["policy"] for part in parts], rel=1e-12)
    assert measures["value_loss"].tolist() == pytest.approx([part["value"] for part in parts], rel=1e-12)
    assert measures["entropy"].tolist() == ENTROPIES.tolist()
    assert measures["step_kl"].tolist() == (OLD - NEW).tolist()
    assert not any(measure.requires_grad for measure in measures.values())


def test_more_entropy_is_less_loss() -> None:
    """Of a model's own logits: a step against the gradient makes its distributions flatter, and the loss smaller."""
    stage = PpoConfig.model_validate({**OFF, "advantage": "rloo", "entropy": 0.2})
    logits = torch.randn(TOKENS, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.arange(TOKENS) % 20
    tables = {name: table.float() for name, table in known(stage, torch.zeros_like(ADVANTAGES)).items()}

    def loss_and_entropy(at: torch.Tensor) -> tuple[torch.Tensor, float]:
        log_probs, entropies = logit_scores(at, labels, entropy="trained")
        scores = TokenScores(log_probs, entropies, None)
        loss, _ = step_loss(scores, tables, stage, TOTALS, max_tokens=MOST, kl_coefficient=COEFFICIENT)
        return loss, entropies.sum().item()

    before, entropy = loss_and_entropy(logits)
    before.backward()
    assert before.item() == pytest.approx(-0.2 * entropy / TOTALS.tokens, rel=1e-5)
    assert logits.grad is not None
    after, flatter = loss_and_entropy((logits - 10 * logits.grad).detach())
    assert flatter > entropy
    assert after.item() < before.item()
