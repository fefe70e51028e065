"""Rewards that a rule tells from the answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import regex  # type: ignore[import-untyped]  # unlike `re` it can be told when to give up

from rayloom.errors import JobError
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
        pattern = regex.compile(self.config.pattern, regex.DOTALL)
        return [float(self._matches(pattern, one.answer)) for one in answered]

    def _matches(self, pattern: Any, answer: str) -> bool:
        try:
            return pattern.fullmatch(answer, timeout=self.config.timeout) is not None
        except TimeoutError:
            raise JobError(
                f"the trainer waited {self.config.timeout:g} s for the reward format, whether {answer!r:.200} matches "
                f"{self.config.pattern!r}; write the pattern so that it has fewer ways to match, or raise its timeout"
            ) from None

    def close(self) -> None:
        """Nothing was started."""


@dataclass(frozen=True)
class Unfinished:
    """1 where the answer was cut off, else 0."""

    def score(self, answered: Sequence[Answered]) -> list[float]:
        return [float(one.finish_reason == "length") for one in answered]

    def close(self) -> None:
        """Nothing was started."""
