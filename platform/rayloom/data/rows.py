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

from rayloom.data.pack import pack
from rayloom.data.plan import Plan
from rayloom.errors import RequestError

IGNORED = -100
"""Label of a token that is not trained (`torch.nn.functional.cross_entropy`'s default `ignore_index`)."""

DROP_REASONS = ("longer than the cutoff", "nothing to train")

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "position_ids": pa.list_(pa.int32()),
        "sets": pa.list_(pa.int32()),  # of each example in the row: the number of its data set ...
        "rows": pa.list_(pa.int64()),  # ... and its row there
        "dropped": pa.list_(pa.int32()),  # on a segment's first row: examples left out, per set and reason
        "epoch": pa.int64(),
        "segment": pa.int64(),
        "row": pa.int64(),
        "epochs_done": pa.float64(),  # at the end of the row
        "error": pa.string(),  # why a segment could not be made; such a table has one row, and nothing else in it
    }
)


@dataclass(frozen=True)
class Encoded:
    """One example as tokens: `labels[i]` is `input_ids[i]` where it is trained, else `IGNORED`."""

    input_ids: list[int]
    labels: list[int]
    set: int
    row: int


def segment_table(
    plan: Plan, epoch: int, segment: int, examples: Sequence[Encoded], dropped: Sequence[int], capacity: int | None
) -> pa.Table:
    """The token rows of one segment.

    Args:
        examples: the segment's examples in stream order.
        dropped: how many examples were left out, per set and reason, sets first.
        capacity: tokens in a packed row; None: one example a row.
    """
    if capacity is None:
        groups = [[index] for index in range(len(examples))]
    else:
        groups = pack([len(example.input_ids) for example in examples], capacity)
    if not groups:  # all were left out; an empty row still tells how many
        groups = [[]]
    rows = []
    for number, group in enumerate(groups):
        members = [examples[index] for index in group]
        rows.append(
            {
                "input_ids": [token for example in members for token in example.input_ids],
                "labels": [label for example in members for label in example.labels],
                "position_ids": [i for example in members for i in range(len(example.input_ids))],
                "sets": [example.set for example in members],
                "rows": [example.row for example in members],
                "dropped": list(dropped) if number == 0 else [],
                "epoch": epoch,
                "segment": segment,
                "row": number,
                "epochs_done": plan.epochs_done(epoch, segment, (number + 1) / len(groups)),
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def error_table(error: RequestError) -> pa.Table:
    """A table that stands for a segment that could not be made.

    Errors travel as data: of an exception in a task Ray Data hands on the text only, and the user's is not to be
    told by its text.
    """
    return pa.Table.from_pylist([{"error": json.dumps(error.messages)}], schema=SCHEMA)


def raise_error(table: pa.Table) -> None:
    """Raise the `RequestError` that the table stands for, if it does."""
    if table.num_rows and (messages := table["error"][0].as_py()):
        raise RequestError(*json.loads(messages))


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
