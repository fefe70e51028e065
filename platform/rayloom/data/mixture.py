"""The mixture: which data set gives each slot of an epoch, as a pure function of the slot's number.

Give data set *d* weight w_d and let its i-th row (from 0) stand at time (2i + 1) / (2 w_d). Reading the rows of all
sets in order of time is Webster's (Sainte-Lague's) method of apportionment: while none of D sets has run out, a set of
share s is within 1/2 + s (D - 2) / 2 rows of its exact share of the slots so far (half a row for two sets, less than
one for three). How many rows each set has given after n slots is found by bisection, without walking there. The four
strategies differ only in where the times begin to be ignored and where the epoch ends:

| strategy         | weights           | a set that ran out | the epoch ends                          |
|------------------|-------------------|--------------------|-----------------------------------------|
| concat           | the sets' lengths | gives no more      | when all ran out (each row exactly once) |
| interleave_once  | as given          | gives no more      | when all ran out (each row exactly once) |
| interleave_under | as given          | (does not happen)  | before a set would have to repeat       |
| interleave_over  | as given          | starts again       | with the last row of the last set       |

Times are compared as exact fractions: no rounding decides a slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

Strategy = Literal["concat", "interleave_under", "interleave_over", "interleave_once"]


@dataclass(frozen=True)
class Mixture:
    """Shares of several data sets in one epoch.

    Attributes:
        lengths: rows of each set, each at least 1.
        weights: relative share of each set, each above 0; ignored by `concat`.
        strategy: see the module's table.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    strategy: Strategy

    def __post_init__(self) -> None:
        if not self.lengths or len(self.lengths) != len(self.weights):
            raise ValueError(f"{len(self.lengths)} lengths and {len(self.weights)} weights; need one of each per set")
        if min(self.lengths) < 1:
            raise ValueError(f"every set needs at least one row; lengths are {self.lengths}")
        if min(self.weights) <= 0:
            raise ValueError(f"every weight must be above 0; weights are {self.weights}")

    @cached_property
    def rates(self) -> tuple[Fraction, ...]:
        """Rows of each set per unit of time."""
        if self.strategy == "concat":
            return tuple(Fraction(length) for length in self.lengths)
        return tuple(Fraction(str(weight)) for weight in self.weights)

    @cached_property
    def epoch_length(self) -> int:
        """Slots in one epoch."""
        if self.strategy in ("concat", "interleave_once"):
            return sum(self.lengths)
        if self.strategy == "interleave_over":
            # The last slot is the last row of the set that takes longest, the later set where two tie.
            end = max((self._time(d, self.lengths[d] - 1), d) for d in range(len(self.lengths)))
            return sum(self._rows_up_to(d, end, inclusive=True) for d in range(len(self.lengths)))
        # The first slot that is missing is the first row after a set's end, the earlier set where two tie.
        end = min((self._time(d, self.lengths[d]), d) for d in range(len(self.lengths)))
        return sum(self._rows_up_to(d, end, inclusive=False) for d in range(len(self.lengths)))

    def counts(self, slots: int) -> tuple[int, ...]:
        """Rows that each set has given in the first `slots` slots of an epoch; they sum to `slots`.

        With `interleave_over` a count may pass the set's length: row n is then row n mod length of pass n // length.
        """
        if not 0 <= slots <= self.epoch_length:
            raise ValueError(f"slots must lie in 0..{self.epoch_length}, not {slots}")
        low, high = 0, self._last_tick + 1  # counts at tick `low` never exceed `slots`
        while high - low > 1:
            middle = (low + high) // 2
            if sum(self._counts_at(middle)) <= slots:
                low = middle
            else:
                high = middle
        counts = list(self._counts_at(low))
        for _ in range(slots - sum(counts)):  # the few rows between two ticks, one by one
            counts[self._next_set(counts)] += 1
        return tuple(counts)

    def slots(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The slots `start..stop` as (set, row of that set), sets in turn; the caller shuffles within a block."""
        first, last = self.counts(start), self.counts(stop)
        return [(d, row) for d in range(len(self.lengths)) for row in range(first[d], last[d])]

    def _time(self, d: int, row: int) -> Fraction:
        return Fraction(2 * row + 1) / (2 * self.rates[d])

    def _rows_up_to(self, d: int, end: tuple[Fraction, int], *, inclusive: bool) -> int:
        """Rows of set `d` that stand before (time, set), or at it when `inclusive`."""
        time, at = end
        steps = time * self.rates[d] + Fraction(1, 2)
        rows = math.floor(steps)
        stands_at_end = steps.denominator == 1
        if stands_at_end and (d > at or (d == at and not inclusive)):
            rows -= 1
        return rows

    @property
    def _repeats(self) -> bool:
        return self.strategy == "interleave_over"

    @cached_property
    def _tick(self) -> Fraction:
        return 1 / sum(self.rates, Fraction(0))

    @cached_property
    def _last_tick(self) -> int:
        latest = max(self._time(d, length) for d, length in enumerate(self.lengths))
        return math.ceil(latest / self._tick)

    def _counts_at(self, tick: int) -> tuple[int, ...]:
        time = tick * self._tick
        counts: Sequence[int] = [math.floor(time * rate + Fraction(1, 2)) for rate in self.rates]
        if not self._repeats:
            counts = [min(count, length) for count, length in zip(counts, self.lengths, strict=True)]
        return tuple(counts)

    def _next_set(self, counts: Sequence[int]) -> int:
        open_sets = [d for d, length in enumerate(self.lengths) if self._repeats or counts[d] < length]
        return min(open_sets, key=lambda d: (self._time(d, counts[d]), d))
