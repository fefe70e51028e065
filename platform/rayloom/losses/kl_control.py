"""The weight of the divergence from the reference, fixed or following a target."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class KlControl:
    """A proportional controller (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2)."""

    coefficient: float
    target: float | None = None
    """Of the divergence of an answer, in nats; None: the coefficient stays."""
    horizon: int = 10_000
    """Answers over which it follows."""

    def after(self, divergence: float, answers: int) -> KlControl:
        """The controller after so many answers with this mean divergence.

        The coefficient times 1 + clip(divergence / target - 1, -0.2, 0.2) * min(answers / horizon, 1): more answers
        than the horizon are one horizon, or it could change by more than the clip, and below 0.
        """
        if self.target is None:
            return self
        error = min(0.2, max(-0.2, divergence / self.target - 1))
        return replace(self, coefficient=self.coefficient * (1 + error * min(answers / self.horizon, 1)))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
