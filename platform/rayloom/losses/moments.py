"""Mean and deviation of all numbers so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Moments:
    """Of the numbers so far their count, mean, and summed squares of what they differ from it by; two of them merge
    (Chan, Golub & LeVeque 1983, The American Statistician 37, equation 2.1). Sums of squares themselves would lose the
    digits of a deviation that is small against the mean."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Moments:
        if not numbers:
            return cls()
        mean = sum(numbers) / len(numbers)
        return cls(float(len(numbers)), mean, sum((number - mean) ** 2 for number in numbers))

    def merged(self, other: Moments) -> Moments:
        """Of the numbers of both."""
        count = self.count + other.count
        if not count:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * other.count / count
        squares = self.squares + other.squares + shift**2 * self.count * other.count / count
        return Moments(count, mean, squares)

    @property
    def deviation(self) -> float:
        """Of the numbers as a population; of fewer than two 1."""
        return (self.squares / self.count) ** 0.5 if self.count > 1 else 1.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
