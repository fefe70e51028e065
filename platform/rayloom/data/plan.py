"""The order of the stream: what the next examples are, from a few integers.

An epoch is the mixture's sequence of slots, cut into segments of `window` slots. A segment is what one task reads,
tokenizes and packs, so everything after the plan depends on the segment alone. Within a segment the examples are
shuffled; within a data set the chunks are permuted, and the rows are permuted within groups of neighbouring chunks
large enough to mix and small enough to read. All of it is keyed by (seed, epoch, pass, set).

Nobody counts the rows of a whole set. A position holds a cursor for each set; the segment that begins there, and the
position after it, follow from counting the chunks that the segment touches (`walk.py`).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayloom.data.description import Description
from rayloom.data.files import DataFile
from rayloom.data.mixture import Mixture, Strategy

SHUFFLE_ROWS = 4096


@dataclass(frozen=True, order=True)
class Cursor:
    """Where a data set stands in an epoch: its next row is row `row` of group `group` of pass `pass_number`."""

    pass_number: int = 0
    group: int = 0
    row: int = 0
    given: int = 0
    """Rows that the set has given in this epoch."""

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """The fields in order."""
        return self.pass_number, self.group, self.row, self.given


@dataclass(frozen=True)
class Position:
    """Where a job is in the stream: the next token row is row `row` of segment `segment` of epoch `epoch`.

    The cursors are those of the segment's first example. With the seed and the data they tell all that follows.
    """

    epoch: int = 0
    segment: int = 0
    row: int = 0
    cursors: tuple[Cursor, ...] = ()
    """One for each set; none at the beginning of an epoch."""
    lengths: tuple[int | None, ...] = ()
    """Rows of each set; None where its end has not been seen yet; empty where none has."""

    def as_dict(self) -> dict[str, Any]:
        """For metrics and checkpoints: numbers and lists of numbers."""
        return {
            "epoch": self.epoch,
            "segment": self.segment,
            "row": self.row,
            "cursors": [list(cursor.numbers) for cursor in self.cursors],
            "lengths": list(self.lengths),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Position:
        cursors = tuple(Cursor(*numbers) for numbers in state["cursors"])
        return cls(state["epoch"], state["segment"], state["row"], cursors, tuple(state["lengths"]))


@dataclass(frozen=True)
class DataSet:
    """A data set whose files have been located."""

    name: str
    description: Description
    files: tuple[DataFile, ...]
    estimated_rows: int
    """About how many rows the set has; exact where the files tell, and where they have been counted."""
    is_counted: bool = False
    """Whether the rows have been counted, as those of small sets are."""
    chosen: tuple[int, ...] | None = None
    """The chunks that belong to the set, where `max_samples` leaves some out; None: all."""
    last_rows: int | None = None
    """How many rows of the last chosen chunk belong to the set; None: all."""

    @cached_property
    def _chunks_before(self) -> list[int]:
        return [0, *accumulate(file.chunks for file in self.files)]

    @property
    def chunks(self) -> int:
        """Chunks of the set."""
        return len(self.chosen) if self.chosen is not None else self._chunks_before[-1]

    @property
    def length(self) -> int | None:
        """Rows in the set, where that is known without counting."""
        if self.is_counted or self.last_rows is not None or all(file.chunk_rows is not None for file in self.files):
            return self.estimated_rows
        return None

    def chunk(self, index: int) -> int:
        """The number, among all chunks of the files, of the set's chunk `index`."""
        return self.chosen[index] if self.chosen is not None else index

    def index(self, chunk: int) -> int:
        """The other way round: which of the set's chunks that is."""
        return self.chosen.index(chunk) if self.chosen is not None else chunk

    def locate(self, chunk: int) -> tuple[DataFile, int]:
        """The file that holds a chunk, and the chunk's number in that file."""
        file = bisect_right(self._chunks_before, chunk) - 1
        return self.files[file], chunk - self._chunks_before[file]

    def known_rows(self, chunk: int) -> int | None:
        """Rows of a chunk, where the file tells."""
        file, index = self.locate(chunk)
        return None if file.chunk_rows is None else file.chunk_rows[index]

    @property
    def fingerprint(self) -> str:
        """Changes when a file of the set, or the choice of its rows, does."""
        what = [[file.address, file.fingerprint] for file in self.files]
        text = json.dumps([what, self.chosen, self.last_rows, self.description.model_dump()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def group_chunks(self) -> int:
        """How many neighbouring chunks are shuffled together: about `SHUFFLE_ROWS` rows."""
        return max(1, -(-SHUFFLE_ROWS * self.chunks // max(1, self.estimated_rows)))


@dataclass(frozen=True)
class Segment:
    """The examples of one segment, in stream order: arrays of one length."""

    start: Position
    sets: NDArray[np.int64]
    chunks: NDArray[np.int64]
    """Of each example: the chunk that holds it (`DataSet.locate`) ..."""
    rows: NDArray[np.int64]
    """... and its row there."""
    epochs_before: float
    """Epochs that are done where the segment begins ..."""
    epochs_after: float
    """... and where it ends. Estimates within an epoch, exact at its ends."""

    def __len__(self) -> int:
        return len(self.rows)

    def epochs_done(self, share: float) -> float:
        """Epochs that are done at `share` (0 to 1) of the segment: 1.25 is about a quarter into the second."""
        return self.epochs_before + share * (self.epochs_after - self.epochs_before)


@dataclass(frozen=True)
class Plan:
    """The whole order of a job's examples."""

    sets: tuple[DataSet, ...]
    weights: tuple[float, ...]
    """Shares of the sets; with `concat` their (estimated) lengths."""
    strategy: Strategy
    seed: int
    window: int
    epochs: int | None
    """Passes to make; None: without end (the job stops by steps)."""

    @property
    def lengths(self) -> tuple[int | None, ...]:
        """Rows of each set, where that is known without counting."""
        return tuple(data_set.length for data_set in self.sets)

    def mixture(self, lengths: Sequence[int | None]) -> Mixture:
        """The mixture, given what is known of the lengths."""
        return Mixture(tuple(lengths), self.weights, self.strategy)

    def estimated_mixture(self, lengths: Sequence[int | None] = ()) -> Mixture:
        """The mixture with an estimate for every length that is not known."""
        known = tuple(lengths) or self.lengths
        return self.mixture(
            [data_set.estimated_rows if n is None else n for data_set, n in zip(self.sets, known, strict=True)]
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """For each set a text that changes when its files do."""
        return {data_set.name: data_set.fingerprint for data_set in self.sets}

    @property
    def estimated_epoch_length(self) -> int:
        """About how many examples an epoch has."""
        length = self.estimated_mixture().epoch_length
        assert length is not None  # all lengths are given
        return length

    @property
    def is_exact(self) -> bool:
        """Whether the estimates are exact: all lengths are known without counting."""
        return None not in self.lengths

    def segments_left(self, start: Position) -> int | None:
        """About how many segments there are from `start` on, its own included; None: without end."""
        if self.epochs is None:
            return None
        in_epoch = -(-self.estimated_epoch_length // self.window)
        return max(1, (self.epochs - start.epoch) * in_epoch - start.segment)
