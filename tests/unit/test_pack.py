"""Packing: complete, within capacity, best fit decreasing, and tight."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloom.data.pack import pack

CAPACITY = 40
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=40)


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition, row by row: the longest first, into the fullest row that holds it, the earlier where two tie."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = [(capacity - sum(lengths[i] for i in row), number) for number, row in enumerate(rows)]
        fitting = [(room, number) for room, number in free if room >= lengths[index]]
        if fitting:
            rows[min(fitting)[1]].append(index)
        else:
            rows.append([index])
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])


@given(lengths=LENGTHS)
def test_it_is_best_fit_decreasing(lengths):
    assert pack(lengths, CAPACITY) == best_fit_decreasing(lengths, CAPACITY)


@given(lengths=LENGTHS)
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths):
    rows = pack(lengths, CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= CAPACITY for row in rows)


@given(lengths=LENGTHS)
def test_order_is_kept(lengths):
    rows = pack(lengths, CAPACITY)
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@given(lengths=LENGTHS)
def test_no_two_rows_could_be_one(lengths):
    """The later of two rows was opened by an example for which the earlier one, however empty then, had no room."""
    sums = [sum(lengths[index] for index in row) for row in pack(lengths, CAPACITY)]
    assert all(one + other > CAPACITY for one, other in combinations(sums, 2))


def test_golden():
    # 7 + 3, 6 + 4 and 5 + 5 are full, so the 2 is alone; rows stand in the order of their first example.
    assert pack([6, 5, 7, 4, 5, 3, 2], 10) == [[0, 3], [1, 4], [2, 5], [6]]
    # Best fit, not first fit: the 2 goes to the 8 although the 7 came first and has room.
    assert pack([7, 2, 8], 10) == [[0], [1, 2]]
    # Ties: of two rows that are equally full the earlier one; of equal examples the earlier first.
    assert pack([6, 6, 3, 3, 3], 10) == [[0, 2], [1, 3], [4]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


def test_lengths_of_real_data_fill_the_rows():
    """Conversations are about log-normal: median 165 tokens, a tail up to the cutoff; windows of 512 examples."""
    random = np.random.default_rng(0)
    filled = rows = 0
    for _ in range(20):
        lengths = np.exp(random.normal(5.1, 0.9, size=512)).astype(int).clip(8, 2048).tolist()
        packed = pack(lengths, 2048)
        filled, rows = filled + sum(lengths), rows + len(packed)
    assert filled / (rows * 2048) >= 0.97


def test_an_example_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="an example of 11 tokens does not fit in a row of 10"):
        pack([3, 11], 10)
