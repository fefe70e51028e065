"""What has been trained on: counted from the rows, summed over the ranks, kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayloom.data.plan import Cursor, Position
from rayloom.data.rows import COUNTERS, SCHEMA
from rayloom.train.meter import BatchCount, StepCount, StreamMeter

NOTHING = {"input_ids": [], "labels": [], "position_ids": [], "desirable": -1, "sets": [], "rows": [], "counts": []}


PER_SET = len(COUNTERS)
CURSORS = [0, 1, 2, 3, -1, 4, 5, 6, 7, 8]
"""Of two sets: the first set's length is not known yet."""


def at(epoch: int, segment: int, row: int) -> Position:
    return Position(epoch, segment, row, (Cursor(0, 1, 2, 3), Cursor(4, 5, 6, 7)), (None, 8))


def token_rows(*rows: dict[str, Any]) -> pa.Table:
    filled = [{"continued": [False] * len(row.get("sets", ())), **NOTHING, **row} for row in rows]
    return pa.Table.from_pylist(filled, schema=SCHEMA)


ROWS = (
    {
        "input_ids": [1, 2, 3, 4],
        "labels": [1, 2, -100, 4],
        "sets": [0, 1, 1],
        "rows": [10, 11, 12],
        "counts": list(range(2 * PER_SET)),
        "cursors": CURSORS,
        "epoch": 0,
        "segment": 3,
        "row": 0,
        "epochs_done": 0.25,
    },
    {
        "input_ids": [5, 6],
        "labels": [-100, 6],
        "sets": [1],
        "rows": [13],
        "cursors": CURSORS,
        "epoch": 0,
        "segment": 3,
        "row": 1,
        "epochs_done": 0.5,
    },
)


def count_of(*rows: dict[str, Any], sets: int = 2) -> BatchCount:
    count = BatchCount(sets)
    count.add(token_rows(*rows))
    return count


def test_a_batch_is_counted():
    step = count_of(*ROWS).share(torch.device("cpu"), stop=False)
    assert step.tokens == 6
    assert step.trained_tokens == 3  # labels 2, 4 and 6: the first token of a row is predicted by nothing
    assert step.batches == 1
    assert not step.stop
    assert step.position == at(0, 3, 2)  # the row behind the last one that was taken
    assert step.epochs_done == 0.5
    meter = StreamMeter.start(2)
    step.add_to(meter)
    assert meter == StreamMeter(at(0, 3, 2), [1, 3], list(range(2 * PER_SET)), 6, 3, 0.5)
    assert count_of(*ROWS).names == [(0, 10), (1, 11), (1, 12), (1, 13)]


def test_the_labels_of_a_slice_are_its_own():
    """Arrow slices share their buffers: the rows before must not be counted."""
    count = BatchCount(2)
    count.add(token_rows(*ROWS).slice(1))
    assert count.share(torch.device("cpu"), stop=False).trained_tokens == 1


def test_batches_of_a_step_add_up():
    together, apart = count_of(*ROWS), BatchCount(2)
    for row in ROWS:
        apart.add(token_rows(row))
    device = torch.device("cpu")
    one, other = together.share(device, stop=False), apart.share(device, stop=False)
    assert (one.batches, other.batches) == (1, 2)
    assert (one.position, one.epochs_done) == (other.position, other.epochs_done)
    assert [n for i, n in enumerate(one.numbers) if i != 3] == [n for i, n in enumerate(other.numbers) if i != 3]


def test_an_empty_batch_counts_as_a_batch():
    """A rank whose share of the last global batch is empty still takes part."""
    count = BatchCount(1)
    count.add(SCHEMA.empty_table())
    step = count.share(torch.device("cpu"), stop=False)
    assert (step.batches, step.tokens, step.trained_tokens, step.position) == (
        1,
        0,
        0,
        Position(0, 0, 0, (Cursor(),), (0,)),
    )


def test_a_segment_of_which_nothing_is_left_moves_the_position():
    counts = [4, *[0] * (PER_SET - 1)]
    row = {"counts": counts, "cursors": CURSORS[5:], "epoch": 1, "segment": 2, "row": 0, "epochs_done": 1.5}
    step = count_of(row, sets=1).share(torch.device("cpu"), stop=False)
    assert (step.tokens, step.epochs_done) == (0, 1.5)
    assert step.position == Position(1, 2, 1, (Cursor(4, 5, 6, 7),), (8,))
    meter = StreamMeter.start(1)
    step.add_to(meter)
    assert (meter.examples, meter.counts) == ([0], counts)


@pytest.mark.parametrize("stopper", [None, 0, 1, 2])
def test_ranks_are_summed_and_the_furthest_position_counts(monkeypatch, stopper):
    """Three ranks, with the collective call played by this process."""
    counts = [
        count_of(ROWS[1]),
        count_of(
            {
                "input_ids": [1],
                "labels": [1],
                "sets": [0],
                "rows": [14],
                "cursors": CURSORS,
                "epoch": 1,
                "segment": 0,
                "row": 0,
                "epochs_done": 1.1,
            }
        ),
        BatchCount(2),  # its stream has ended
    ]
    sent: list[torch.Tensor] = []

    def send(everyone: list[torch.Tensor], mine: torch.Tensor) -> None:
        sent.append(mine)
        raise InterruptedError  # nothing has come back yet

    def gather(everyone: list[torch.Tensor], mine: torch.Tensor) -> None:
        for target, tensor in zip(everyone, sent, strict=True):
            target.copy_(tensor)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather", send)
    for rank, count in enumerate(counts):
        with pytest.raises(InterruptedError):
            count.share(torch.device("cpu"), stop=rank == stopper)

    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    steps = [count.share(torch.device("cpu"), stop=rank == stopper) for rank, count in enumerate(counts)]
    assert steps[0] == steps[1] == steps[2]
    assert (steps[0].tokens, steps[0].trained_tokens, steps[0].batches) == (3, 1, 2)
    assert (steps[0].position, steps[0].epochs_done) == (at(1, 0, 1), 1.1)
    assert steps[0].stop == (stopper is not None)


def test_large_counts_stay_exact():
    """Counts travel as float64, exact up to 2^53 in one step."""
    count = BatchCount(1)
    count.numbers[0] = 2**53
    assert count.share(torch.device("cpu"), stop=False).tokens == 2**53


COUNTS = st.integers(0, 10**15)


@given(
    position=st.builds(
        Position,
        COUNTS,
        COUNTS,
        COUNTS,
        st.lists(st.builds(Cursor, COUNTS, COUNTS, COUNTS, COUNTS), max_size=3).map(tuple),
        st.lists(st.none() | COUNTS, max_size=3).map(tuple),
    ),
    counts=st.lists(COUNTS, min_size=1, max_size=4),
    tokens=COUNTS,
    epochs_done=st.floats(0, 1e6),
    step=COUNTS,
)
def test_a_checkpoint_brings_the_meter_back(position, counts, tokens, epochs_done, step, tmp_path_factory):
    folder = Path(tmp_path_factory.getbasetemp())
    meter = StreamMeter(position, counts, [*counts, *counts], tokens, tokens // 2, epochs_done)
    meter.save(folder, step)
    assert StreamMeter.load(folder) == (meter, step)


def test_a_meter_starts_at_the_beginning():
    assert StreamMeter.start(2) == StreamMeter(Position(), [0, 0], [0] * (2 * PER_SET), 0, 0, 0.0)


def test_steps_add_up_over_a_resume(tmp_path):
    step = StepCount(Position(0, 1, 0), 0.5, [10, 4, 0, 2, 3, *range(PER_SET)], sets=1)
    meter = StreamMeter.start(1)
    step.add_to(meter)
    meter.save(tmp_path, 1)
    resumed, _ = StreamMeter.load(tmp_path)
    StepCount(Position(0, 2, 0), 1.0, [10, 4, 0, 2, 3, *range(PER_SET)], sets=1).add_to(resumed)
    assert resumed == StreamMeter(Position(0, 2, 0), [6], [2 * n for n in range(PER_SET)], 20, 8, 1.0)


def test_a_piece_that_goes_on_has_a_name_and_is_counted_once():
    rows = [{**ROWS[1], "sets": [1, 0], "rows": [13, 10], "continued": [True, False], "counts": [0] * 2 * PER_SET}]
    count = BatchCount(2)
    count.add(token_rows(*rows))
    assert count.names == [(1, 13), (0, 10)]
    assert count.share("cpu", stop=False).examples == 1
