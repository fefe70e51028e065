"""Token rows: what the stream hands to the workers, as Arrow tables.

A row is one line of a training batch: one example, or several that were packed. It carries its position, so a worker
knows where in the stream it is, and the examples in it, so that they can be counted and named.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayloom.data.encoding import IGNORED
from rayloom.data.pack import pack
from rayloom.data.permutation import permutation
from rayloom.data.plan import Cursor, Position, Segment
from rayloom.errors import RequestError

DROP_REASONS = (
    "cannot be read",
    "does not fit its format",
    "refused by the template",
    "longer than the cutoff",
    "nothing to train",
    "the answers are the same",
)
UNREADABLE, MISFIT, REFUSED, TOO_LONG, UNTRAINED, EQUAL = range(len(DROP_REASONS))
COUNTERS = (*DROP_REASONS, "held out", "cut", "tokens cut")
"""What is counted of each data set: examples left out by reason, examples kept for evaluation, examples that were cut
to the cutoff, and the tokens that they lost."""
HELD_OUT, CUT, TOKENS_CUT = range(len(DROP_REASONS), len(COUNTERS))

SAME_LENGTH_ROWS = 32
"""Of rows by length so many of nearly one length follow each other: batches hold little padding."""

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "position_ids": pa.list_(pa.int32()),
        "desirable": pa.int8(),  # whether the row's answer was judged a good one: 1 or 0, -1 where nobody judged it
        "answer": pa.string(),  # of a row that is a bare prompt: the answer that the data has to it
        "sets": pa.list_(pa.int32()),  # of each example in the row: the number of its data set, ...
        "rows": pa.list_(pa.int64()),  # ... its row there, `row_id`, ...
        "continued": pa.list_(pa.bool_()),  # ... and whether it goes on from an earlier piece, which was counted
        "counts": pa.list_(pa.int64()),  # on a segment's first row: `COUNTERS` of each set, sets first
        "epoch": pa.int64(),
        "segment": pa.int64(),
        "row": pa.int64(),
        "cursors": pa.list_(pa.int64()),  # of the segment: `flatten_cursors`
        "epochs_done": pa.float64(),  # at the end of the row
        "error": pa.string(),  # why a segment could not be made; such a table has one row, and nothing else in it
    }
)


@dataclass(frozen=True)
class Encoded:
    """One example as tokens: `labels[i]` is `input_ids[i]` where it is trained, else `IGNORED`."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    set: int
    row: int
    continues: bool = False
    """Whether it goes on from an earlier piece of the same example, which stands for the whole."""
    border: int = 0
    """`Encoding.border`."""
    desirable: bool | None = None
    """`Encoding.desirable`."""
    answer: str | None = None
    """`Encoding.answer`."""


def row_id(chunk: int, row: int) -> int:
    """The number by which a row of a data set is known: the chunk in the upper, the row in the lower 32 bits."""
    return chunk << 32 | row


def row_name(number: int) -> str:
    """A row's number for people and manifests: `chunk:row`."""
    return f"{number >> 32}:{number & 0xFFFFFFFF}"


def segment_table(
    segment: Segment,
    examples: Sequence[Encoded],
    counts: Sequence[int],
    capacity: int | None,
    seed: int,
    *,
    by_length: bool = False,
) -> pa.Table:
    """The token rows of one segment.

    Args:
        examples: the segment's examples in stream order.
        counts: `COUNTERS` of each set, sets first.
        capacity: tokens in a packed row; None: one example a row. Two sequences of one example (`Encoding.border`) are
            always a row of their own.
        by_length: whether rows of one example each have neighbours of nearly their length; else they are in stream
            order.
        seed: of the order of the runs of like length.
    """
    lengths = [len(example.input_ids) for example in examples]
    start = segment.start
    if capacity is None or any(example.border for example in examples):
        order = _by_length(lengths, (seed, start.epoch, "rows", start.segment)) if by_length else range(len(lengths))
        groups = [[index] for index in order]
    else:
        groups = pack(lengths, capacity)
    if not groups:  # all were left out; an empty row still tells how many
        groups = [[]]
    ids = [np.asarray(example.input_ids, dtype=np.int32) for example in examples]
    labels = [np.array(example.labels, dtype=np.int32) for example in examples]
    for one, example in zip(labels, examples, strict=True):
        one[:1] = IGNORED  # a sequence's first token has nothing before it that it could be predicted from
        one[example.border : example.border + 1] = IGNORED
    positions = np.arange(max([0, *lengths]), dtype=np.int32)
    of_examples = [
        np.concatenate([positions[: example.border], positions[: length - example.border]])
        for example, length in zip(examples, lengths, strict=True)
    ]
    cursors = flatten_cursors(start)
    columns = {
        "input_ids": _lists(groups, ids, pa.int32()),
        "labels": _lists(groups, labels, pa.int32()),
        "position_ids": _lists(groups, of_examples, pa.int32()),
        "desirable": [judgement(examples[group[0]].desirable if group else None) for group in groups],
        "answer": [examples[group[0]].answer if group else None for group in groups],
        "sets": [[examples[index].set for index in group] for group in groups],
        "rows": [[examples[index].row for index in group] for group in groups],
        "continued": [[examples[index].continues for index in group] for group in groups],
        "counts": [list(counts), *([] for _ in groups[1:])],
        "epoch": [start.epoch] * len(groups),
        "segment": [start.segment] * len(groups),
        "row": list(range(len(groups))),
        "cursors": [cursors] * len(groups),
        "epochs_done": [segment.epochs_done((number + 1) / len(groups)) for number in range(len(groups))],
        "error": [None] * len(groups),
    }
    return pa.table(columns, schema=SCHEMA)


def second_start(positions: np.ndarray) -> int:
    """Where the second of a row's sequences begins; 0: there is one. `positions` begin at 0 in each."""
    starts = np.flatnonzero(positions[1:] == 0)
    return int(starts[0]) + 1 if len(starts) else 0


def judgement(desirable: bool | None) -> int:
    """`Encoding.desirable` as it stands in a table: 1, 0, or -1 for None."""
    return -1 if desirable is None else int(desirable)


def _lists(groups: Sequence[Sequence[int]], parts: Sequence[np.ndarray], value_type: pa.DataType) -> pa.Array:
    """A list column: each row is the parts of its group, one after the other."""
    rows = [sum(len(parts[index]) for index in group) for group in groups]
    values = np.concatenate([np.empty(0, dtype=np.int32), *(parts[index] for group in groups for index in group)])
    offsets = pa.array(np.cumsum([0, *rows]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values, value_type))


def _by_length(lengths: Sequence[int], key: tuple[object, ...]) -> list[int]:
    """Runs of neighbours in length, the runs in a random order that `key` fixes."""
    order = np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable")
    runs = [order[start : start + SAME_LENGTH_ROWS] for start in range(0, len(order), SAME_LENGTH_ROWS)]
    return [int(index) for run in permutation(len(runs), *key) for index in runs[run]]


_UNKNOWN = -1
CURSOR_NUMBERS = 5
"""Whole numbers that stand for one set's cursor and length."""


def flatten_cursors(position: Position) -> list[int]:
    """The cursors and lengths of a position as whole numbers, `CURSOR_NUMBERS` for each set."""
    return [
        number
        for cursor, length in zip(position.cursors, position.lengths, strict=True)
        for number in (*cursor.numbers, _UNKNOWN if length is None else length)
    ]


def position_from(numbers: Sequence[int]) -> Position:
    """The position that epoch, segment, row and `flatten_cursors` stand for."""
    epoch, segment, row, *flat = numbers
    sets = [flat[start : start + CURSOR_NUMBERS] for start in range(0, len(flat), CURSOR_NUMBERS)]
    return Position(
        epoch,
        segment,
        row,
        tuple(Cursor(*numbers[:-1]) for numbers in sets),
        tuple(None if length == _UNKNOWN else length for *_, length in sets),
    )


def error_table(error: RequestError, schema: pa.Schema = SCHEMA) -> pa.Table:
    """A table of `schema` that stands for a segment that could not be made.

    Errors travel as data: of an exception in a task Ray Data hands on the text only, and the user's is not to be
    told by its text.
    """
    return pa.Table.from_pylist([{"error": json.dumps(error.messages)}], schema=schema)


def raise_error(table: pa.Table) -> None:
    """Raise the `RequestError` that the table stands for, if it does."""
    for messages in table["error"].drop_null():
        raise RequestError(*json.loads(messages.as_py()))


def collate(table: pa.Table, pad_token: int) -> dict[str, np.ndarray]:
    """Pad a batch of rows on the right to its longest row; an empty batch becomes one row of padding.

    Returns:
        int64 arrays of shape (batch, length): `input_ids`, `labels` (`IGNORED` in the padding), and `position_ids`,
        which start again at each example and at the padding, so that attention keeps them apart.
    """
    lengths = [len(ids) for ids in table["input_ids"]]
    shape = (max(1, len(lengths)), max([2, *lengths]))
    input_ids = np.full(shape, pad_token, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    for index, length in enumerate(lengths):
        for target, name in ((input_ids, "input_ids"), (labels, "labels"), (position_ids, "position_ids")):
            target[index, :length] = table[name][index].values.to_numpy(zero_copy_only=False)
    for index in range(shape[0]):
        length = lengths[index] if lengths else 0
        position_ids[index, length:] = np.arange(shape[1] - length)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
