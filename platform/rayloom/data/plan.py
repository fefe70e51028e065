"""The order of the stream: position -> the next example, as arithmetic on a few integers.

An epoch is the mixture's sequence of slots, cut into segments of `window` slots. A segment is what one task reads,
tokenizes and packs, so everything after the plan depends on the segment alone. Within a segment the examples are
shuffled; within a data set the chunks are permuted, and the rows are permuted within groups of neighbouring chunks
large enough to mix and small enough to read. All of it is keyed by (seed, epoch, pass, set): no state, no scan.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate

from rayloom.data.files import Chunk
from rayloom.data.mixture import Mixture
from rayloom.data.permutation import permutation

SHUFFLE_ROWS = 4096


@dataclass(frozen=True, order=True)
class Position:
    """Where a job is in the stream: the next token row is row `row` of segment `segment` of epoch `epoch`."""

    epoch: int = 0
    segment: int = 0
    row: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class RowAddress:
    """A row of a data set: row `row` of its chunk number `chunk`."""

    set: int
    chunk: int
    row: int


@dataclass(frozen=True)
class IndexedSet:
    """A data set whose chunks have been located."""

    name: str
    format: str
    chunks: tuple[Chunk, ...]

    @property
    def length(self) -> int:
        """Rows in the set."""
        return sum(chunk.rows for chunk in self.chunks)


@dataclass(frozen=True)
class Plan:
    """The whole order of a job's examples."""

    sets: tuple[IndexedSet, ...]
    mixture: Mixture
    seed: int
    window: int
    epochs: int | None
    """Passes to make; None: without end (the job stops by steps)."""

    @property
    def segments(self) -> int:
        """Segments in one epoch."""
        return -(-self.mixture.epoch_length // self.window)

    def segment_after(self, start: Position, number: int) -> tuple[int, int]:
        """(epoch, segment) of the `number`-th segment from `start` on; number 0 is `start`'s own."""
        return divmod(start.epoch * self.segments + start.segment + number, self.segments)

    def segments_left(self, start: Position) -> int | None:
        """How many segments there are from `start` on, its own included; None: without end."""
        if self.epochs is None:
            return None
        return max(0, (self.epochs - start.epoch) * self.segments - start.segment)

    def segment(self, epoch: int, index: int) -> list[RowAddress]:
        """The examples of one segment, in stream order."""
        start = index * self.window
        stop = min(start + self.window, self.mixture.epoch_length)
        slots = self.mixture.slots(start, stop)
        addresses = [self._address(epoch, *slot) for slot in slots]  # in slot order, so that the caches serve
        return [addresses[i] for i in permutation(len(slots), self.seed, epoch, "segment", index)]

    def epochs_done(self, epoch: int, index: int, share: float) -> float:
        """Epochs that are done at `share` (0 to 1) of a segment: 1.25 is a quarter into the second."""
        length = self.mixture.epoch_length
        start = index * self.window
        return epoch + (start + share * (min(start + self.window, length) - start)) / length

    def _address(self, epoch: int, set_index: int, number: int) -> RowAddress:
        pass_number, row = divmod(number, self.sets[set_index].length)
        key = (epoch, pass_number, set_index)
        if key not in self._orders:
            while len(self._orders) >= 2 * len(self.sets):
                del self._orders[next(iter(self._orders))]
            data_set = self.sets[set_index]
            self._orders[key] = _SetOrder(data_set, (self.seed, epoch, pass_number, data_set.name))
        return self._orders[key].address(set_index, row)

    @cached_property
    def _orders(self) -> dict[tuple[int, int, int], _SetOrder]:
        """The orders in use, computed again when needed: a small cache, no state."""
        return {}


class _SetOrder:
    """The order of one set's rows in one pass."""

    def __init__(self, data_set: IndexedSet, key: tuple[object, ...]) -> None:
        self._key = key
        self._rows = [chunk.rows for chunk in data_set.chunks]
        self._chunks = permutation(len(data_set.chunks), *key, "chunks")
        # Groups of consecutive (permuted) chunks with at least SHUFFLE_ROWS rows; rows are permuted within a group.
        self._groups: list[list[int]] = [[]]
        filled = 0
        for chunk in self._chunks:
            if filled >= SHUFFLE_ROWS:
                self._groups.append([])
                filled = 0
            self._groups[-1].append(int(chunk))
            filled += self._rows[chunk]
        self._group_rows: dict[int, list[tuple[int, int]]] = {}  # the last two groups that were asked for
        self._starts = [0, *accumulate(sum(self._rows[c] for c in group) for group in self._groups)]

    def address(self, set_index: int, row: int) -> RowAddress:
        """Where the `row`-th row of this pass is stored."""
        group = bisect_right(self._starts, row) - 1
        if group not in self._group_rows:
            addresses = [(chunk, inner) for chunk in self._groups[group] for inner in range(self._rows[chunk])]
            order = permutation(len(addresses), *self._key, "rows", group)
            self._group_rows = {**dict(list(self._group_rows.items())[-1:]), group: [addresses[i] for i in order]}
        chunk, inner = self._group_rows[group][row - self._starts[group]]
        return RowAddress(set_index, chunk, inner)
