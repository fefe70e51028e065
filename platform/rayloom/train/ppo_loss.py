"""The loss of an optimizer step of stage ppo, from what the model says of some answers' tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from rayloom.losses.policy import (
    clipped_policy_loss,
    clipped_share,
    clipped_value_loss,
    kl_estimate,
    mean_over,
)
from rayloom.stages.ppo_config import AdvantageName, PpoConfig
from rayloom.train.collective import over_ranks
from rayloom.train.experience import Experience
from rayloom.train.token_scores import TokenScores

_MEAN_OVER: dict[AdvantageName, Literal["tokens", "answers", "most tokens"]] = {
    "gae": "tokens",
    "reinforce++": "tokens",
    "rloo": "tokens",
    "grpo": "answers",
    "dr_grpo": "most tokens",
}


@dataclass(frozen=True)
class Totals:
    """Of an optimizer step, over all ranks."""

    answers: int
    tokens: int
    """Of the answers."""
    all_tokens: int
    """Those of the prompts too."""

    @classmethod
    def over_ranks(cls, experience: Experience, chosen: torch.Tensor, device: Any) -> Totals:
        """Every rank calls it, with its own answers of the step."""
        tokens = int(experience.mask[chosen].sum())
        prompts = sum(len(experience.answers[n].asked.token_ids) for n in chosen.tolist())
        mine = torch.tensor([len(chosen), tokens, tokens + prompts], dtype=torch.float64)
        return cls(*(int(number) for number in over_ranks(mine, device)))


def step_loss(
    said: TokenScores,
    known: dict[str, torch.Tensor],
    stage: PpoConfig,
    totals: Totals,
    *,
    max_tokens: int,
    kl_coefficient: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This batch's share of the step's loss, and what is measured of its tokens, (kept,) each.

    policy + value_weight * value + kl_coefficient * divergence - entropy * entropy, each a mean as the stage's
    advantage has it; the divergence only where it is a part of the loss.

    Args:
        known: `Experience.known` of these answers.
        max_tokens: that an answer may have.
    """
    given = said.log_probs, known["old_log_probs"], known["advantages"]
    losses = clipped_policy_loss(*given, clip=stage.clip, clip_high=stage.clip_high, dual_clip=stage.dual_clip)
    if "importance" in known:
        losses = losses * known["importance"]
    measures = {
        "policy_loss": losses.detach(),
        "clipped": clipped_share(*given, clip=stage.clip, clip_high=stage.clip_high, dual_clip=stage.dual_clip),
        "entropy": said.entropies.detach(),
        "step_kl": (known["old_log_probs"] - said.log_probs).detach(),
    }
    if said.values is not None and "returns" in known:
        of_values = clipped_value_loss(said.values, known["old_values"], known["returns"], stage.value_clip)
        losses = losses + stage.value_weight * of_values
        measures["value_loss"] = of_values.detach()
    if "reference" in known and stage.kl_place == "loss":
        losses = losses + kl_coefficient * kl_estimate(said.log_probs, known["reference"], stage.kl_estimator)
    if stage.entropy:
        losses = losses - stage.entropy * said.entropies
    over = _MEAN_OVER[stage.advantage]
    loss = mean_over(
        losses, known["lengths"], over, tokens=totals.tokens, answers=totals.answers, max_tokens=max_tokens
    )
    return loss, measures
