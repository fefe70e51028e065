"""Rewards that a rule tells from the answer alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rayloom.rollout.rewards.config import FormatReward, LengthReward
from rayloom.rollout.rewards.source import Answered


@dataclass(frozen=True)
class LengthPenalty:
    """0 up to `free` tokens, then falling evenly to -1 at `longest` (DAPO, equation 13)."""

    config: LengthReward

    def score(self, answered: Sequence[Answered]) -> list[float]:
        free, longest = self.config.free, self.config.longest
        return [-min(1.0, max(0, one.tokens - free) / (longest - free)) for one in answered]

    def close(self) -> None:
        """Nothing was started."""


@dataclass(frozen=True)
class FormatMatch:
    """1 where the whole answer matches the pattern, else 0."""

    config: FormatReward

    def score(self, answered: Sequence[Answered]) -> list[float]:
        pattern = re.compile(self.config.pattern, re.DOTALL)
        return [float(pattern.fullmatch(one.answer) is not None) for one in answered]

    def close(self) -> None:
        """Nothing was started."""


@dataclass(frozen=True)
class Unfinished:
    """1 where the answer was cut off, else 0."""

    def score(self, answered: Sequence[Answered]) -> list[float]:
        return [float(one.finish_reason == "length") for one in answered]

    def close(self) -> None:
        """Nothing was started."""
