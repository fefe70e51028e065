"""From every reward's number to what an answer is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayloom.losses.moments import Moments
from rayloom.rollout.rewards.config import (
    AdapterReward,
    FormatReward,
    FunctionReward,
    HttpReward,
    LengthReward,
    ModelReward,
    Reward,
    RewardsConfig,
)
from rayloom.rollout.rewards.function import FunctionScore
from rayloom.rollout.rewards.http import HttpScore
from rayloom.rollout.rewards.rules import FormatMatch, LengthPenalty, Unfinished
from rayloom.rollout.rewards.source import Answered, RewardSource, checked_scores


def reward_names(config: RewardsConfig) -> list[str]:
    """What each source is called; no two alike (`rayloom.train.ppo_rules` sees to that)."""
    return [source.name or source.type for source in config.sources]


@dataclass(frozen=True)
class Judged:
    """What answers got."""

    total: list[float]
    """The weighted sum."""
    parts: dict[str, list[float]]
    """By name, without their weights."""


class RewardSum:
    """All rewards of a job that are no models: those are the trainer's, which hands in their numbers."""

    def __init__(self, config: RewardsConfig) -> None:
        self._config = config
        self._names = reward_names(config)
        self._sources = {
            name: _source(source, f"rewards.sources[{number}].path")
            for number, (name, source) in enumerate(zip(self._names, config.sources, strict=True))
            if not isinstance(source, AdapterReward | ModelReward)
        }

    def judge(self, answered: Sequence[Answered], given: Mapping[str, Sequence[float]]) -> Judged:
        """Ask every source.

        Args:
            given: by name, what models said of the answers.

        Raises:
            JobError: a source that cannot be asked, or gives no numbers.
        """
        parts = {
            name: checked_scores(given[name], answered, f"rewards: {name}")
            if name in given
            else self._sources[name].score(answered)
            if answered
            else []
            for name in self._names
        }
        weights = [source.weight for source in self._config.sources]
        columns = [parts[name] for name in self._names]
        totals = [
            sum(weight * value for weight, value in zip(weights, row, strict=True))
            for row in zip(*columns, strict=True)
        ]
        return Judged(totals, parts)

    def settled(self, total: Sequence[float], so_far: Moments, of_round: Moments) -> list[float]:
        """The sums as the policy learns from them: normalized or whitened, and clipped, as the job says.

        Args:
            so_far: of all sums of the training, these included.
            of_round: of those of the round, of all ranks.
        """
        found = list(total)
        if self._config.normalize or self._config.whiten:
            moments = so_far if self._config.normalize else of_round
            found = [(value - moments.mean) / (moments.deviation + 1e-8) for value in found]
        bound = self._config.clip
        return found if bound is None else [min(bound, max(-bound, value)) for value in found]

    def close(self) -> None:
        """End what the sources have started."""
        for source in self._sources.values():
            source.close()


def _source(config: Reward, key: str) -> RewardSource:
    if isinstance(config, FunctionReward):
        return FunctionScore(config, key)
    if isinstance(config, HttpReward):
        return HttpScore(config)
    if isinstance(config, LengthReward):
        return LengthPenalty(config)
    if isinstance(config, FormatReward):
        return FormatMatch(config)
    return Unfinished()
