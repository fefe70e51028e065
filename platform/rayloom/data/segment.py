"""The work on one segment: read its examples, encode them, arrange them in token rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

from rayloom.data.example import Example
from rayloom.data.index import read_examples
from rayloom.data.plan import Plan
from rayloom.data.rows import DROP_REASONS, Encoded, segment_table


class Encoder(Protocol):
    """What a stage gives the stream: how an example becomes tokens."""

    def encode(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
        """(input_ids, labels) of each example, however long."""
        ...


def read_segment(plan: Plan, epoch: int, segment: int) -> list[tuple[int, int, Example]]:
    """(set, row of the set, example) of one segment, in stream order. Each chunk is read once.

    Raises:
        RequestError: a row that cannot be read or aligned.
    """
    addresses = plan.segment(epoch, segment)
    wanted: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, address in enumerate(addresses):
        wanted[address.set, address.chunk].append(place)
    found: list[tuple[int, int, Example] | None] = [None] * len(addresses)
    for (set_index, chunk_index), places in sorted(wanted.items()):
        data_set = plan.sets[set_index]
        chunk = data_set.chunks[chunk_index]
        examples = read_examples(data_set, chunk, [addresses[place].row for place in places])
        for place, example in zip(places, examples, strict=True):
            found[place] = (set_index, chunk.first_row + addresses[place].row, example)
    return [item for item in found if item is not None]


def encode_segment(plan: Plan, epoch: int, segment: int, encoder: Encoder, *, cutoff: int, packing: bool) -> pa.Table:
    """The token rows of one segment (`rayloom.data.rows.SCHEMA`)."""
    items = read_segment(plan, epoch, segment)
    encoded, dropped = encode_examples(items, encoder, cutoff, len(plan.sets))
    return segment_table(plan, epoch, segment, encoded, dropped, cutoff if packing else None)


def encode_examples(
    items: Sequence[tuple[int, int, Example]], encoder: Encoder, cutoff: int, sets: int
) -> tuple[list[Encoded], list[int]]:
    """Encode examples; leave out, and count per set and reason, those that cannot be trained on."""
    kept: list[Encoded] = []
    dropped = [0] * (sets * len(DROP_REASONS))
    tokens = encoder.encode([example for _, _, example in items])
    for (set_index, row, _), (input_ids, labels) in zip(items, tokens, strict=True):
        reason = drop_reason(input_ids, labels, cutoff)
        if reason is None:
            kept.append(Encoded(input_ids, labels, set_index, row))
        else:
            dropped[set_index * len(DROP_REASONS) + reason] += 1
    return kept, dropped


def drop_reason(input_ids: Sequence[int], labels: Sequence[int], cutoff: int) -> int | None:
    """Which of `DROP_REASONS` keeps an example out of the training; None: it is trained on."""
    if len(input_ids) > cutoff:
        return 0
    # The first token has nothing before it that it could be predicted from.
    return 1 if all(label < 0 for label in labels[1:]) else None
