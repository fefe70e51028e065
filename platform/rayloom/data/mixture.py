"""The mixture: which data set gives each slot of an epoch, as a pure function of the slot's number.

Give data set *d* weight w_d and let its i-th row (from 0) stand at time (2i + 1) / (2 w_d). Reading the rows of all
sets in order of time is Webster's (Sainte-Lague's) method of apportionment: while none of D sets has run out, a set of
share s is within 1/2 + s (D - 2) / 2 rows of its exact share of the slots so far (half a row for two sets, less than
one for three). How many rows each set has given after n slots is found by bisection, without walking there. The four
strategies differ only in where the times begin to be ignored and where the epoch ends:

| strategy         | a set that ran out | the epoch ends                           |
|------------------|--------------------|------------------------------------------|
| concat           | gives no more      | when all ran out (each row exactly once) |
| interleave_once  | gives no more      | when all ran out (each row exactly once) |
| interleave_under | (does not happen)  | before a set would have to repeat        |
| interleave_over  | starts again       | with the last row of the last set        |

`concat` is `interleave_once` with the sets' lengths (or an estimate of them) as weights.

A length may be unknown as long as the set has not run out: it decides nothing before that. So the stream can start
before anyone has counted the rows, and learn a set's length when it comes to its end.

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
        lengths: rows of each set, at least 1; None where the end has not been seen.
        weights: relative share of each set, above 0.
        strategy: see the module's table.
    """

    lengths: tuple[int | None, ...]
    weights: tuple[float, ...]
    strategy: Strategy

    def __post_init__(self) -> None:
        if not self.lengths or len(self.lengths) != len(self.weights):
            raise ValueError(f"{len(self.lengths)} lengths and {len(self.weights)} weights; need one of each per set")
        if any(length is not None and length < 1 for length in self.lengths):
            raise ValueError(f"every set needs at least one row; lengths are {self.lengths}")
        if min(self.weights) <= 0:
            raise ValueError(f"every weight must be above 0; weights are {self.weights}")

    @cached_property
    def rates(self) -> tuple[Fraction, ...]:
        """Rows of each set per unit of time."""
        return tuple(Fraction(str(weight)) for weight in self.weights)

    @cached_property
    def epoch_length(self) -> int | None:
        """Slots in one epoch; None while too few ends have been seen to tell."""
        known = [(d, length) for d, length in enumerate(self.lengths) if length is not None]
        if self.strategy == "interleave_under" and known:
            # The first slot that is missing is the first row after a set's end, the earlier set where two tie.
            end = min((self._time(d, length), d) for d, length in known)
            return sum(self._rows_up_to(d, end, inclusive=False) for d in range(len(self.lengths)))
        if len(known) < len(self.lengths):
            return None
        if self.strategy == "interleave_over":
            # The last slot is the last row of the set that takes longest, the later set where two tie.
            end = max((self._time(d, length - 1), d) for d, length in known)
            return sum(self._rows_up_to(d, end, inclusive=True) for d in range(len(self.lengths)))
        return sum(length for _, length in known)

    def counts(self, slots: int) -> tuple[int, ...]:
        """Rows that each set has given in the first `slots` slots of an epoch; they sum to `slots`.

        With `interleave_over` a count may pass the set's length: row n is then row n mod length of pass n // length.
        """
        if slots < 0 or (self.epoch_length is not None and slots > self.epoch_length):
            raise ValueError(f"slots must lie in 0..{self.epoch_length}, not {slots}")
        low, high = 0, 1  # counts at tick `low` never exceed `slots`
        while sum(self._counts_at(high)) <= slots and not self._all_ran_out(high):
            low, high = high, 2 * high
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

    def _all_ran_out(self, tick: int) -> bool:
        return not self._repeats and self._counts_at(tick) == self.lengths

    def _counts_at(self, tick: int) -> tuple[int, ...]:
        time = tick * self._tick
        counts = [math.floor(time * rate + Fraction(1, 2)) for rate in self.rates]
        if self._repeats:
            return tuple(counts)
        return tuple(
            count if length is None else min(count, length) for count, length in zip(counts, self.lengths, strict=True)
        )

    def _next_set(self, counts: Sequence[int]) -> int:
        open_sets = [
            d for d, length in enumerate(self.lengths) if self._repeats or length is None or counts[d] < length
        ]
        return min(open_sets, key=lambda d: (self._time(d, counts[d]), d))
