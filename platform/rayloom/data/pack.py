"""Packing: several short examples in one row, and pieces of work in even shares.

Best fit decreasing (Johnson 1973) takes the longest example first and puts it into the fullest row that still holds
it. Ties go to the earlier example and the earlier row, so the result depends on the lengths alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heapreplace


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group the indices of `lengths` into rows of at most `capacity` tokens.

    Rows come in the order of their first example, examples within a row in their own order: packing changes who
    shares a row, and otherwise keeps the stream's order.

    Raises:
        ValueError: a length is above the capacity.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted: the first that fits is the fullest
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"an example of {length} tokens does not fit in a row of {capacity}")
        place = bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([index])
            insort(room, (capacity - length, len(rows) - 1))
        else:
            free, row = room.pop(place)
            rows[row].append(index)
            insort(room, (free - length, row))
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])


def split_evenly(work: Sequence[int], shares: int) -> list[list[int]]:
    """Deal pieces of work: the longest first, each to the share with the least so far (Graham 1969: at most 4/3 of the
    best possible). A pure function of its arguments; equal pieces go by their order.

    Args:
        work: what each piece costs, 0 or above.
        shares: at least 1.

    Returns:
        For each share the indices of its pieces, ascending; every index once.
    """
    loads = [(0, share) for share in range(shares)]
    heapify(loads)
    dealt: list[list[int]] = [[] for _ in range(shares)]
    for index in sorted(range(len(work)), key=lambda index: (-work[index], index)):
        load, share = loads[0]
        dealt[share].append(index)
        heapreplace(loads, (load + work[index], share))
    return [sorted(share) for share in dealt]
