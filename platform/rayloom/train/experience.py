"""What a round taught: of each token of its answers the advantage, and what the loss compares with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

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
from rayloom.losses.moments import Moments
from rayloom.losses.policy import importance_weights, kl_estimate
from rayloom.stages.ppo_config import PpoConfig
from rayloom.train.collective import of_all_ranks
from rayloom.train.ppo_answers import Answer, engine_log_probs, lengths_of

Table = torch.Tensor
"""(answers, width) float32 on CPU, 0 where an answer has no token."""


@dataclass(frozen=True)
class Scored:
    """What the models say of a round's answers before its first step."""

    mask: torch.Tensor
    """(answers, width) bool."""
    log_probs: Table
    """Of the policy."""
    reference: Table | None
    """Of the reference, if there is one."""
    values: Table | None
    """Of the critic, if there is one."""


@dataclass(frozen=True)
class Experience:
    """One rank's part of a round."""

    answers: list[Answer]
    mask: torch.Tensor
    """(answers, width) bool."""
    tables: dict[str, Table]
    """`advantages`, `old_log_probs`, `lengths` (of each token's answer), and where the stage has them `reference`,
    `old_values`, `returns`, `importance`."""

    def known(self, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of some answers all tables, (kept,) each, row by row."""
        mask = self.mask[chosen]
        return {name: table[chosen][mask] for name, table in self.tables.items()}


def make_experience(
    answers: Sequence[Answer],
    scored: Scored,
    rewards: Sequence[float],
    stage: PpoConfig,
    coefficient: float,
) -> Experience:
    """From rewards to advantages. Every rank calls it.

    Args:
        rewards: (answers,)
        coefficient: of the divergence from the reference, where that is taken off the rewards.
    """
    mask = scored.mask
    of_answers = torch.tensor(list(rewards), dtype=torch.float64)  # groups are compared with these digits
    penalties = torch.zeros(mask.shape)
    if scored.reference is not None and stage.kl_place == "reward":
        penalties = coefficient * kl_estimate(scored.log_probs, scored.reference, stage.kl_estimator) * mask
    tables = {
        "old_log_probs": scored.log_probs,
        "lengths": lengths_of(answers).float().unsqueeze(1).expand(mask.shape),
    }
    advantages, returns = _advantages(answers, scored, of_answers, penalties, stage)
    if stage.whiten and stage.advantage in ("gae", "reinforce++"):
        advantages = whiten(advantages, mask, reduce(Moments.merged, of_all_ranks(moments_of(advantages, mask))))
    tables["advantages"] = advantages
    if scored.reference is not None:
        tables["reference"] = scored.reference
    if returns is not None and scored.values is not None:
        tables |= {"returns": returns, "old_values": scored.values}
    if stage.importance_cap is not None:
        engine = engine_log_probs(answers, mask.shape[1])
        tables["importance"] = importance_weights(scored.log_probs, engine, stage.importance_cap)
    return Experience(list(answers), mask, tables)


def _advantages(
    answers: Sequence[Answer], scored: Scored, rewards: torch.Tensor, penalties: Table, stage: PpoConfig
) -> tuple[Table, Table | None]:
    """Advantages, and of `gae` the returns that the critic learns."""
    mask = scored.mask
    if stage.advantage in ("gae", "reinforce++"):
        of_tokens = token_rewards(rewards, penalties, mask)
        if stage.advantage == "reinforce++":
            return discounted_returns(of_tokens, mask, stage.gamma), None
        assert scored.values is not None  # gae has a critic
        return gae(of_tokens, scored.values, mask, gamma=stage.gamma, gae_lambda=stage.gae_lambda)
    totals = rewards - penalties.sum(1)
    groups = torch.tensor([answer.asked.number for answer in answers], dtype=torch.long)
    if stage.advantage == "rloo":
        of_answers = leave_one_out(totals, groups)
    else:
        of_answers = group_relative(totals, groups, scale=stage.advantage == "grpo")
    return of_answers.float().unsqueeze(1) * mask, None


def round_measures(answers: Sequence[Answer], scored: Scored, total: Sequence[float]) -> dict[str, torch.Tensor]:
    """What is told of a round besides its rewards: (answers,) each, or (tokens,)."""
    mask = scored.mask
    gap = (engine_log_probs(answers, mask.shape[1]) - scored.log_probs)[mask].double()
    measures = {
        "reward": torch.tensor(list(total), dtype=torch.float64),
        "answer_tokens": lengths_of(answers).double(),
        "unfinished": torch.tensor([float(a.rollout.finish_reason == "length") for a in answers], dtype=torch.float64),
        "mismatch_kl": gap,  # k1 of engine against trainer, of tokens that the engine drew
        "mismatch": gap.abs(),
    }
    if scored.reference is not None:
        measures["kl"] = ((scored.log_probs - scored.reference) * mask).sum(1).double()
    return measures
