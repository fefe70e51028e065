"""From a position to the segment that begins there, and to the position after it.

It counts the rows of the chunks that the segment touches, and one group of chunks ahead: that is how a set's end is
seen before it is passed, so that the mixture knows in time (`mixture.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rayloom.data.files import count_rows
from rayloom.data.permutation import permutation
from rayloom.data.plan import Cursor, DataSet, Plan, Position, Segment

_GROUPS_KEPT = 3  # of each set: the one in use, the one ahead, and the one that a repeated task may ask for again

Addresses = NDArray[np.int64]
"""(rows, 2): the chunk and the row in it."""


def count_chunk(data_set: DataSet, chunk: int) -> int:
    """Rows of a chunk: from the file's own index where it has one, else by reading the chunk."""
    known = data_set.known_rows(chunk)
    return count_rows(*data_set.locate(chunk)) if known is None else known


class Walk:
    """Computes segments. It keeps what it has counted last; what it returns depends on the position alone."""

    def __init__(self, plan: Plan, count: Callable[[DataSet, int], int] = count_chunk) -> None:
        self._plan = plan
        self._orders = [_SetOrder(data_set, plan.seed, count) for data_set in plan.sets]

    def segments(self, start: Position) -> Iterator[Segment]:
        """The segments from `start`'s own on, to the end of the last epoch."""
        while self._plan.epochs is None or start.epoch < self._plan.epochs:
            segment, start = self.step(start)
            yield segment

    def step(self, start: Position) -> tuple[Segment, Position]:
        """The segment that begins at `start` (its `row` is not looked at), and the position of the next one."""
        plan = self._plan
        sets = range(len(plan.sets))
        cursors = start.cursors or tuple(Cursor() for _ in sets)
        lengths = list(start.lengths or plan.lengths)
        first = start.segment * plan.window
        while True:
            mixture = plan.mixture(lengths)
            end = mixture.epoch_length
            stop = first + plan.window if end is None else min(first + plan.window, end)
            wanted = mixture.counts(stop)
            taken = [self._orders[d].take(start.epoch, cursors[d], wanted[d] - cursors[d].given) for d in sets]
            seen = [lengths[d] if taken[d].length is None else taken[d].length for d in sets]
            if seen == lengths:
                break
            lengths = seen  # a set's end has come in sight: once more, knowing where it is
        is_last = stop == end
        after = Position(
            start.epoch + is_last,
            0 if is_last else start.segment + 1,
            0,
            () if is_last else tuple(part.cursor for part in taken),
            tuple(lengths),
        )
        order = permutation(stop - first, plan.seed, start.epoch, "segment", start.segment)
        addresses = np.concatenate([part.addresses for part in taken])[order]
        estimated = plan.estimated_mixture(lengths).epoch_length or 1
        segment = Segment(
            replace(start, row=0, cursors=cursors, lengths=tuple(lengths)),
            np.repeat(np.arange(len(plan.sets)), [len(part.addresses) for part in taken])[order],
            addresses[:, 0],
            addresses[:, 1],
            start.epoch + min(first / estimated, 1.0),
            start.epoch + (1.0 if is_last else min(stop / estimated, 1.0)),
        )
        return segment, after


@dataclass(frozen=True)
class _Taken:
    addresses: Addresses
    cursor: Cursor
    length: int | None
    """Rows of the set, where its end is in sight."""


class _SetOrder:
    """The order in which one set gives its rows."""

    def __init__(self, data_set: DataSet, seed: int, count: Callable[[DataSet, int], int]) -> None:
        self._set = data_set
        self._seed = seed
        self._count = count
        self._chunk_orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._groups: dict[tuple[int, int, int], Addresses] = {}

    def take(self, epoch: int, cursor: Cursor, rows: int) -> _Taken:
        """The next `rows` rows from `cursor` on; fewer where the set ends and its `length` says so."""
        parts: list[Addresses] = [np.empty((0, 2), dtype=np.int64)]
        length = None
        while True:
            group = self._group(epoch, cursor.pass_number, cursor.group)
            part = group[cursor.row : cursor.row + rows]
            parts.append(part)
            rows -= len(part)
            cursor = replace(cursor, row=cursor.row + len(part), given=cursor.given + len(part))
            is_last = cursor.group == self._last_group
            if is_last and cursor.pass_number == 0:
                length = cursor.given - cursor.row + len(group)
            if cursor.row < len(group):
                break  # all was taken
            if not is_last:  # also where nothing more is wanted: the rest may be empty
                cursor = replace(cursor, group=cursor.group + 1, row=0)
            elif rows and cursor.given:
                cursor = replace(cursor, pass_number=cursor.pass_number + 1, group=0, row=0)
            else:
                break
        return _Taken(np.concatenate(parts), cursor, length)

    @property
    def _last_group(self) -> int:
        return (self._set.chunks - 1) // self._set.group_chunks

    def _group(self, epoch: int, pass_number: int, number: int) -> Addresses:
        key = (epoch, pass_number, number)
        if key not in self._groups:
            while len(self._groups) >= _GROUPS_KEPT:
                del self._groups[next(iter(self._groups))]
            self._groups[key] = self._make_group(epoch, pass_number, number)
        return self._groups[key]

    def _make_group(self, epoch: int, pass_number: int, number: int) -> Addresses:
        start = number * self._set.group_chunks
        parts = [
            self._rows(int(index))
            for index in self._chunk_order(epoch, pass_number)[start : start + self._set.group_chunks]
        ]
        rows = np.concatenate([np.empty((0, 2), dtype=np.int64), *parts])
        return rows[permutation(len(rows), self._seed, epoch, pass_number, self._set.name, "rows", number)]

    def _rows(self, index: int) -> Addresses:
        chunk = self._set.chunk(index)
        rows = np.arange(self._count(self._set, chunk), dtype=np.int64)
        if self._set.last_rows is not None and index == self._set.chunks - 1:
            rows = permutation(len(rows), self._seed, self._set.name, "sample", chunk)[: self._set.last_rows]
        return np.stack([np.full(len(rows), chunk), rows], axis=1)

    def _chunk_order(self, epoch: int, pass_number: int) -> NDArray[np.int64]:
        key = (epoch, pass_number)
        if key not in self._chunk_orders:
            while len(self._chunk_orders) >= 2:
                del self._chunk_orders[next(iter(self._chunk_orders))]
            order = permutation(self._set.chunks, self._seed, epoch, pass_number, self._set.name, "chunks")
            self._chunk_orders[key] = order
        return self._chunk_orders[key]
