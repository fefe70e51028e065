"""Dealing the stream: batch k of the job is rows k W B ... (k + 1) W B of the stream, however it came in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloom.data.deal import deal
from rayloom.data.rows import SCHEMA
from rayloom.data.stream import task_ranges


def table(start: int, stop: int) -> pa.Table:
    """Token rows numbered `start` to `stop` in their column `row`."""
    blank = {"input_ids": [1], "labels": [1], "position_ids": [0], "sets": [0], "rows": [0], "dropped": []}
    rows = [{**blank, "epoch": 0, "segment": 0, "row": number, "epochs_done": 0.0} for number in range(start, stop)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


STREAM = table(0, 60)


def blocks_of(sizes: list[int]) -> list[pa.Table]:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [STREAM.slice(start, size) for start, size in zip(starts, sizes, strict=True)]


def numbers(batch: pa.Table) -> list[int]:
    assert batch.schema == SCHEMA
    return batch["row"].to_pylist()


SIZES = st.lists(st.integers(0, 9), max_size=6)
WORKERS = st.integers(1, 5)
BATCH = st.integers(1, 5)


@given(sizes=SIZES, workers=WORKERS, batch=BATCH)
def test_every_batch_of_the_job_is_the_next_rows_of_the_stream(sizes, workers, batch):
    dealt = [[numbers(t) for t in deal(blocks_of(sizes), rank, workers, batch)] for rank in range(workers)]
    total, together = sum(sizes), workers * batch
    assert {len(batches) for batches in dealt} == {-(-total // together)}  # the same number for every worker
    for k, of_all in enumerate(zip(*dealt, strict=True)):
        assert [row for own in of_all for row in own] == list(range(k * together, min((k + 1) * together, total)))
        if (k + 1) * together <= total:
            assert all(len(own) == batch for own in of_all)


@given(sizes=SIZES, workers=WORKERS, batch=BATCH)
def test_row_i_goes_to_worker_i_over_b_mod_w(sizes, workers, batch):
    for rank in range(workers):
        rows = [row for own in deal(blocks_of(sizes), rank, workers, batch) for row in numbers(own)]
        assert rows == [i for i in range(sum(sizes)) if (i // batch) % workers == rank]


@given(sizes=SIZES, others=SIZES, workers=WORKERS, batch=BATCH)
def test_the_blocks_do_not_matter(sizes, others, workers, batch):
    total = min(sum(sizes), sum(others))
    for rank in range(workers):
        first, second = (
            [numbers(t) for t in deal(cut_to(blocks_of(blocks), total), rank, workers, batch)]
            for blocks in (sizes, others)
        )
        assert first == second


def cut_to(blocks: list[pa.Table], total: int) -> list[pa.Table]:
    cut = []
    for block in blocks:
        cut.append(block.slice(0, min(block.num_rows, total)))
        total -= cut[-1].num_rows
    return cut


def test_a_batch_is_handed_over_when_its_last_row_has_come():
    """Nothing is read ahead here: the next block is on its way already, and a worker must not wait for it."""
    taken = []

    def blocks() -> Iterator[pa.Table]:
        for number, block in enumerate(blocks_of([4, 4, 4])):
            taken.append(number)
            yield block

    batches = deal(blocks(), 1, 2, 2)
    assert taken == []
    assert (numbers(next(batches)), taken) == ([2, 3], [0])
    assert (numbers(next(batches)), taken) == ([6, 7], [0, 1])


def test_golden_remainder():
    dealt = [[numbers(t) for t in deal(blocks_of([3, 4, 4]), rank, 3, 2)] for rank in range(3)]
    assert dealt == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10]]]
    assert [[numbers(t) for t in deal(blocks_of([7]), rank, 3, 2)] for rank in range(3)] == [
        [[0, 1], [6]], [[2, 3], []], [[4, 5], []],
    ]  # fmt: skip
    assert list(deal([], 0, 2, 2)) == []


@pytest.mark.parametrize("first", [0, 1])
def test_tasks_cover_all_segments_in_order(first):
    for segments in range(1, 40):
        ranges = task_ranges(first, segments)
        assert [n for start, stop in ranges for n in range(start, stop)] == list(range(first, segments))
    assert task_ranges(0, 21) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 12), (12, 20), (20, 21)]
    assert task_ranges(1, 21) == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 13), (13, 21)]
