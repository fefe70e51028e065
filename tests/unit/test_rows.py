"""Token rows as tables, and batches as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloom.data.encoding import IGNORED
from rayloom.data.plan import Cursor, Position, Segment
from rayloom.data.rows import SCHEMA, Encoded, collate, error_table, raise_error, row_id, row_name, segment_table
from rayloom.errors import RequestError

PAD = 7


def segment(epoch: int = 1, number: int = 2) -> Segment:
    """The third segment of an epoch of ten rows in segments of four, but for its addresses."""
    none = np.empty(0, dtype=np.int64)
    start = Position(epoch, number, 0, (Cursor(0, 1, 3, 8),), (10,))
    return Segment(start, none, none, none, epoch + number * 0.4, min(epoch + number * 0.4 + 0.4, epoch + 1.0))


def encoded(ids: list[int], set_index: int = 0, row: int = 0) -> Encoded:
    """The first token of each is the prompt's."""
    return Encoded(ids, [IGNORED, *ids[1:]], set_index, row)


def rows(*lengths: int) -> pa.Table:
    """A table of token rows of these lengths."""
    blank: dict[str, Any] = {
        "sets": [],
        "rows": [],
        "counts": [],
        "cursors": [],
        "epoch": 0,
        "segment": 0,
        "row": 0,
        "epochs_done": 0.0,
    }
    made = [
        {
            **blank,
            "input_ids": [100 * number + i for i in range(length)],
            "labels": [-100 * number - i for i in range(length)],
            "position_ids": list(range(length)),
        }
        for number, length in enumerate(lengths, 1)
    ]
    return pa.Table.from_pylist(made, schema=SCHEMA)


# --- segment_table --------------------------------------------------------------------------------------------------


def test_packed_rows():
    examples = [encoded([1, 2, 3], 0, 5), encoded([4, 5, 6, 7, 8], 0, 2), encoded([9, 10], 0, 8)]
    table = segment_table(segment(), examples, [1, 0], capacity=5, seed=0)
    assert table.schema == SCHEMA
    assert table.to_pylist() == [
        {
            "input_ids": [1, 2, 3, 9, 10],
            "labels": [-100, 2, 3, -100, 10],
            "position_ids": [0, 1, 2, 0, 1],
            "desirable": -1,
            "answer": None,
            "sets": [0, 0],
            "rows": [5, 8],
            "continued": [False, False],
            "counts": [1, 0],
            "cursors": [0, 1, 3, 8, 10],
            "epoch": 1,
            "segment": 2,
            "row": 0,
            "epochs_done": pytest.approx(1.9),  # slots 8 to 10 of 10, the first half of them
            "error": None,
        },
        {
            "input_ids": [4, 5, 6, 7, 8],
            "labels": [-100, 5, 6, 7, 8],
            "position_ids": [0, 1, 2, 3, 4],
            "desirable": -1,
            "answer": None,
            "sets": [0],
            "rows": [2],
            "continued": [False],
            "counts": [],
            "cursors": [0, 1, 3, 8, 10],
            "epoch": 1,
            "segment": 2,
            "row": 1,
            "epochs_done": 2.0,
            "error": None,
        },
    ]


@pytest.mark.parametrize("by_length", [False, True])
def test_rows_without_packing_are_the_examples(by_length):
    examples = [encoded([1, 2, 3, 4], 0, 5), encoded([3], 0, 2), encoded([4, 5], 0, 8)]
    table = segment_table(segment(0, 0), examples, [0, 0], capacity=None, seed=0, by_length=by_length)
    ids, numbers = [[1, 2, 3, 4], [3], [4, 5]], [[5], [2], [8]]
    order = [1, 2, 0] if by_length else [0, 1, 2]
    assert table["input_ids"].to_pylist() == [ids[n] for n in order]
    assert table["rows"].to_pylist() == [numbers[n] for n in order]
    assert table["row"].to_pylist() == [0, 1, 2]
    assert table["epochs_done"].to_pylist() == pytest.approx([0.4 / 3, 0.8 / 3, 0.4])


def test_runs_of_like_length_come_in_any_order():
    """Batches hold little padding, and the stream does not go from short to long in every segment."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 500, size=512)
    examples = [encoded([1] * int(n), 0, i) for i, n in enumerate(lengths)]
    table = segment_table(segment(), examples, [], capacity=None, seed=0, by_length=True)
    order = [len(ids) for ids in table["input_ids"]]
    assert sorted(order) == sorted(lengths)
    batches = np.array(order).reshape(-1, 8)
    assert batches.sum() / (8 * batches.max(axis=1)).sum() > 0.97
    assert np.abs(np.corrcoef(np.arange(512), order)[0, 1]) < 0.6
    other = segment_table(segment(), examples, [], capacity=None, seed=1, by_length=True)
    assert other["rows"] != table["rows"]


def test_a_piece_that_goes_on_is_no_new_example():
    pieces = [Encoded([1, 2, 3], [-100, 2, 3], 0, 7), Encoded([3, 4], [-100, 4], 0, 7, continues=True)]
    table = segment_table(segment(), pieces, [0, 0], capacity=3, seed=0)
    assert table["rows"].to_pylist() == [[7], [7]]
    assert table["continued"].to_pylist() == [[False], [True]]
    assert table["input_ids"].to_pylist() == [[1, 2, 3], [3, 4]]


@pytest.mark.parametrize("capacity", [None, 8])
def test_a_segment_of_which_nothing_is_left_is_one_empty_row(capacity):
    """It still says what was left out, and how far the stream has come."""
    (row,) = segment_table(segment(0, 1), [], [3, 1], capacity, seed=0).to_pylist()
    assert (row["input_ids"], row["labels"], row["position_ids"], row["sets"], row["rows"]) == ([], [], [], [], [])
    assert (row["counts"], row["row"], row["segment"], row["epochs_done"]) == ([3, 1], 0, 1, pytest.approx(0.8))


def test_a_row_is_known_by_its_chunk_and_its_row_there():
    assert row_name(row_id(70_000, 12)) == "70000:12"


def test_an_error_travels_as_a_table():
    table = error_table(RequestError("first: é", "second"))
    assert table.schema == SCHEMA
    with pytest.raises(RequestError) as raised:
        raise_error(table)
    assert raised.value.messages == ("first: é", "second")


def test_other_tables_are_no_errors():
    raise_error(rows(3))
    raise_error(SCHEMA.empty_table())
    raise_error(segment_table(segment(), [], [3, 1], None, seed=0))


# --- collate --------------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right():
    batch = collate(rows(2, 4), PAD)
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[100, 101, PAD, PAD], [200, 201, 202, 203]],
        "labels": [[-100, -101, IGNORED, IGNORED], [-200, -201, -202, -203]],
        "position_ids": [[0, 1, 0, 1], [0, 1, 2, 3]],  # the padding is kept apart as another example would be
    }


@given(lengths=st.lists(st.integers(0, 6), max_size=5), start=st.integers(0, 3))
def test_every_token_is_where_it_belongs(lengths, start):
    whole = rows(9, 9, 9, *lengths)
    table = pa.concat_tables([whole.slice(3, start), whole.slice(3 + start)])  # as blocks cut it, not at offset 0
    batch = collate(table, PAD)
    expected = table.to_pylist()
    shape = (max(1, len(lengths)), max([2, *lengths]))
    for name, filling in (("input_ids", PAD), ("labels", IGNORED)):
        assert batch[name].dtype == np.int64
        assert batch[name].shape == shape
        padded = [row[name] + [filling] * (shape[1] - len(row[name])) for row in expected]
        assert batch[name].tolist() == (padded or [[filling] * shape[1]])
    positions = [row["position_ids"] for row in expected] or [[]]
    assert batch["position_ids"].tolist() == [own + list(range(shape[1] - len(own))) for own in positions]


def test_an_empty_batch_is_one_row_of_padding():
    """A rank without rows must still take part in the step."""
    for table in (SCHEMA.empty_table(), rows(0)):
        batch = collate(table, PAD)
        assert batch["input_ids"].tolist() == [[PAD, PAD]]
        assert batch["labels"].tolist() == [[IGNORED, IGNORED]]
        assert batch["position_ids"].tolist() == [[0, 1]]


def test_packed_positions_stay():
    positions = pa.array([[0, 1, 0, 1, 2]], SCHEMA.field("position_ids").type)
    table = rows(5).set_column(2, SCHEMA.field("position_ids"), positions)
    assert collate(table, PAD)["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
