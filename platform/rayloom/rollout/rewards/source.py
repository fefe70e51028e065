"""What every reward gets and gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rayloom.errors import JobError


@dataclass(frozen=True)
class Answered:
    """An answer to be judged."""

    prompt: str
    """As the model saw it, with the template's own tokens."""
    answer: str
    """Without special tokens."""
    reference: str
    """The answer that the data has, or an empty text."""
    tokens: int
    """Of the answer, its end of turn included."""
    finish_reason: Literal["stop", "length"]
    """`length`: it was cut off."""


class RewardSource(Protocol):
    """Gives every answer a number."""

    def score(self, answered: Sequence[Answered]) -> list[float]:
        """One finite number for each answer, in order.

        Raises:
            JobError: naming the reward, and the answer where it is the answer's fault.
        """
        ...

    def close(self) -> None:
        """End what it has started."""
        ...


def as_numbers(found: Any) -> list[float] | None:
    """A sequence of numbers as floats; None: it is something else."""
    if isinstance(found, str | bytes | Mapping | Set):
        return None
    try:
        return [float(score) for score in found]
    except (TypeError, ValueError):
        return None


def checked_scores(found: Any, answered: Sequence[Answered], who: str) -> list[float]:
    """The scores as floats.

    Args:
        who: gave them; begins the message.

    Raises:
        JobError: they are not as many numbers as there are answers.
    """
    scores = as_numbers(found)
    if scores is None:
        raise JobError(f"{who} must give a list of {len(answered)} numbers, not {found!r:.200}")
    if len(scores) != len(answered):
        raise JobError(f"{who} gave {len(scores)} numbers for {len(answered)} answers; it must give one for each")
    for score, one in zip(scores, answered, strict=True):
        if not math.isfinite(score):
            raise JobError(f"{who} gave {score} for the answer {one.answer!r:.200} to {one.prompt!r:.200}")
    return scores
