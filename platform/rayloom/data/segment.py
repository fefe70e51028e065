"""The work on one segment: read its examples, encode them, arrange them in token rows."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import pyarrow as pa

from rayloom.data.encoding import IGNORED, Encoding
from rayloom.data.example import Example
from rayloom.data.files import place, read_rows
from rayloom.data.formats import FORMATS, Row
from rayloom.data.mismatch import with_mismatches
from rayloom.data.plan import DataSet, Plan, Segment
from rayloom.data.rows import (
    COUNTERS,
    CUT,
    EQUAL,
    HELD_OUT,
    MISFIT,
    REFUSED,
    SCHEMA,
    TOKENS_CUT,
    TOO_LONG,
    UNREADABLE,
    UNTRAINED,
    Encoded,
    row_id,
    segment_table,
)
from rayloom.data.store import read_stored
from rayloom.errors import RequestError

SIDE_COLUMN = "rayloom_side"
"""Where a row fills this column, it alone tells the side, which stays when a part of the row is made anew."""


class Encoder(Protocol):
    """What a stage gives the stream: how an example becomes tokens."""

    @property
    def splits(self) -> bool:
        """Whether what is longer than the cutoff goes on in further rows, as plain text does."""
        ...

    def key(self) -> str:
        """Changes with everything that changes the tokens: the tokenizer, the template, the rules of the mask."""
        ...

    def encode(self, examples: Sequence[Example], cutoff: int) -> list[Encoding]:
        """The tokens of each example, cut to `cutoff` where it is longer and the encoder does not split."""
        ...


@dataclass(frozen=True)
class SegmentOptions:
    """How the examples of a stream become token rows."""

    cutoff: int
    packing: bool
    """Whether several examples share a row."""
    by_length: bool = False
    """Whether rows of one example each have neighbours of nearly their length."""
    mismatched: bool = False
    """Whether each example gets a second sequence, its prompt with another example's answer (`data.mismatch`)."""
    on_bad_row: Literal["error", "skip"] = "error"
    held_out: float = 0.0
    """Share of the rows (0 to below 1) that is kept from training for evaluation."""
    part: Literal["train", "held out"] = "train"
    """Which of the two the stream is."""
    stores: tuple[str | None, ...] = ()
    """For each set the folder of its prepared tokens (`rayloom.data.store`), if there is one."""
    converters: str | None = None
    """The user's file of converters, loaded where the rows are read."""


@dataclass(frozen=True)
class Item:
    """One example of a segment, or why there is none."""

    set: int
    row: int
    """`rayloom.data.rows.row_id`."""
    example: Example | None = None
    encoding: Encoding | None = None
    """Its tokens, where they have been prepared."""
    fault: str = ""
    counter: int | None = None
    """Which of `COUNTERS` it adds to, where there is no example."""
    side: float = 0.0
    """0 to 1: a row below `held_out` is held out."""


def read_segment(plan: Plan, segment: Segment, options: SegmentOptions) -> list[Item]:
    """The examples of one segment, in stream order. Each chunk is read once.

    Raises:
        RequestError: a file that cannot be read; with `on_bad_row: error` also a row that cannot be read or aligned.
    """
    wanted: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, key in enumerate(zip(segment.sets.tolist(), segment.chunks.tolist(), strict=True)):
        wanted[key].append(number)
    items: dict[int, Item] = {}
    for (set_index, chunk), numbers in sorted(wanted.items()):
        rows = [int(segment.rows[number]) for number in numbers]
        read = read_chunk(plan.sets[set_index], set_index, chunk, rows, options)
        items |= zip(numbers, (_on_its_side(item, options) for item in read), strict=True)
    return [items[number] for number in range(len(segment))]


def _on_its_side(item: Item, options: SegmentOptions) -> Item:
    if item.counter is None and options.held_out and (item.side < options.held_out) != (options.part == "held out"):
        return Item(item.set, item.row, counter=HELD_OUT)
    return item


def read_chunk(
    data_set: DataSet, set_index: int, chunk: int, rows: Sequence[int], options: SegmentOptions
) -> list[Item]:
    """Rows of one chunk, held out or not.

    Raises:
        RequestError: as `read_segment`.
    """
    store = options.stores[set_index] if options.stores else None
    if store is not None:
        stored = read_stored(store, data_set.index(chunk), rows)
        return [
            Item(set_index, row_id(chunk, row), encoding=None if counter is not None else encoding, counter=counter,
                 side=side)
            for row, (encoding, counter, side) in zip(rows, stored, strict=True)
        ]  # fmt: skip
    items = []
    for row, raw in zip(rows, read_rows(*data_set.locate(chunk), rows), strict=True):
        number = row_id(chunk, row)
        if raw.columns is None:
            item = Item(set_index, number, fault=raw.fault or "cannot be read", counter=UNREADABLE)
        else:
            try:
                example = align(raw.columns, data_set, options.converters)
                item = Item(set_index, number, example, side=side_of(raw.columns) if options.held_out else 0.0)
            except ValueError as error:
                fault = f"{error} (read as {data_set.description.format})"
                item = Item(set_index, number, fault=fault, counter=MISFIT)
        if item.fault and options.on_bad_row == "error":
            raise RequestError(f"{place(*data_set.locate(chunk), row)}: {item.fault}")
        items.append(item)
    return items


def align(row: Row, data_set: DataSet, converters: str | None) -> Example:
    """One raw row in the standard form.

    Raises:
        ValueError: what is wrong with the row.
    """
    name = data_set.description.format
    if name in FORMATS:
        return FORMATS[name](row, data_set.description)
    assert converters is not None  # the name was checked when the plan was made
    from rayloom.data.formats import load_converters

    return load_converters(converters)[name](row, data_set.description)


def side_of(columns: Row) -> float:
    """A number from 0 to 1 that depends on what the row says, so equal rows are always on the same side."""
    said = columns if columns.get(SIDE_COLUMN) is None else columns[SIDE_COLUMN]
    text = json.dumps(said, sort_keys=True, ensure_ascii=True, default=repr)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2.0**64


@dataclass(frozen=True)
class EncodeSegment:
    """The work of a training stream: a segment -> its token rows (`rayloom.data.rows.SCHEMA`)."""

    encoder: Encoder
    options: SegmentOptions
    schema: pa.Schema = SCHEMA

    def __call__(self, plan: Plan, segment: Segment) -> pa.Table:
        """The token rows of one segment.

        Raises:
            RequestError: a file that cannot be read, or a bad row where such rows are not skipped.
        """
        items = read_segment(plan, segment, self.options)
        encoded, counts = encode_items(plan, items, self.encoder, self.options)
        capacity = self.options.cutoff if self.options.packing else None
        return segment_table(segment, encoded, counts, capacity, plan.seed, by_length=self.options.by_length)


def encode_items(
    plan: Plan, items: Sequence[Item], encoder: Encoder, options: SegmentOptions
) -> tuple[list[Encoded], list[int]]:
    """The examples that are trained on; those that are left out or cut are counted per set.

    Raises:
        RequestError: with `on_bad_row: error`, an example that the template refuses.
    """
    kept: list[Encoded] = []
    counts = [0] * (len(plan.sets) * len(COUNTERS))

    def count(item: Item, counter: int, number: int = 1) -> None:
        counts[item.set * len(COUNTERS) + counter] += number

    for item, encoding in zip(items, encode_all(plan.sets, items, encoder, options), strict=True):
        if item.counter is not None:
            count(item, item.counter)
        if encoding is None:
            continue
        pieces = split(encoding, options.cutoff) if encoder.splits else [encoding]
        reason = drop_reason(pieces[0], options.cutoff)
        if reason is not None:
            count(item, reason)
            continue
        if encoding.cut:
            count(item, CUT)
            count(item, TOKENS_CUT, encoding.cut)
        kept += [
            Encoded(one.input_ids, one.labels, item.set, item.row, number > 0, one.border, one.desirable, one.answer)
            for number, one in enumerate(pieces)
        ]
    return (with_mismatches(kept, options.cutoff) if options.mismatched else kept), counts


def encode_all(
    sets: Sequence[DataSet], items: Sequence[Item], encoder: Encoder, options: SegmentOptions
) -> list[Encoding | None]:
    """The tokens of each item, prepared or made now; None where there is no example.

    Raises:
        RequestError: as `encode_items`.
    """
    encodings = iter(encoder.encode([item.example for item in items if item.example is not None], options.cutoff))
    made: list[Encoding | None] = []
    for item in items:
        encoding = next(encodings) if item.example is not None else item.encoding
        if encoding is not None and encoding.fault is not None and options.on_bad_row == "error":
            where = place(*sets[item.set].locate(item.row >> 32), item.row & 0xFFFFFFFF)
            raise RequestError(f"{where}: {encoding.fault}")
        made.append(encoding)
    return made


def split(encoding: Encoding, cutoff: int) -> list[Encoding]:
    """A long text as several pieces. Each begins with the last token of the one before, which is not trained again:
    so every token but the text's first is predicted once, and none is lost where a piece ends."""
    ids, labels = encoding.input_ids, encoding.labels
    if len(ids) <= cutoff:
        return [encoding]
    starts = range(0, len(ids) - 1, cutoff - 1)
    return [Encoding(ids[start : start + cutoff], [IGNORED, *labels[start + 1 : start + cutoff]]) for start in starts]


def drop_reason(encoding: Encoding, cutoff: int) -> int | None:
    """Which of `DROP_REASONS` keeps an example out of the training; None: it is trained on."""
    if encoding.fault is not None:
        return REFUSED
    sequences = [(encoding.input_ids[part], encoding.labels[part]) for part in encoding.parts]
    if any(len(ids) > cutoff for ids, _ in sequences) or (encoding.cut and not encoding.input_ids):
        return TOO_LONG  # no cut makes it fit
    # The first token has nothing before it that it could be predicted from.
    if any(max(labels[1:], default=IGNORED) < 0 for _, labels in sequences):
        return UNTRAINED
    return EQUAL if len(sequences) == 2 and sequences[0] == sequences[1] else None
