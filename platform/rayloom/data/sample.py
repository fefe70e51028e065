"""The beginning of the stream, measured: lengths, trained tokens, what is left out, how the examples pack.

It reads whole segments from position 0 on, as the job will, so what it measures is what the job's first steps get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayloom.data.encoding import Encoding
from rayloom.data.pack import pack
from rayloom.data.plan import Plan, Position
from rayloom.data.rows import Encoded
from rayloom.data.segment import Encoder, SegmentOptions, drop_reason, encode_all, read_segment, split
from rayloom.data.walk import Walk


@dataclass(frozen=True)
class Measured:
    """One example of the sample, by numbers."""

    set: int
    tokens: int
    """Tokens that are left of it at the cutoff."""
    cut: int
    """Tokens that it loses to the cutoff."""
    trained: int
    """Tokens that the loss is taken of."""
    dropped: int | None
    """Which of `DROP_REASONS` keeps it out; None: it is trained on."""


@dataclass(frozen=True)
class Sample:
    """The first examples of epoch 0, in stream order."""

    first: tuple[Encoded, ...]
    """The very first ones whole, those that will be left out among them."""
    examples: tuple[Measured, ...]
    packed_rows: int
    """Rows that the trained examples make when each segment is packed."""

    is_whole: bool
    """Whether they are all of the epoch."""

    @property
    def kept(self) -> list[Measured]:
        """The examples that are trained on."""
        return [example for example in self.examples if example.dropped is None]

    @property
    def kept_tokens(self) -> int:
        return sum(example.tokens for example in self.kept)


@dataclass(frozen=True)
class Lengths:
    """Tokens of several examples: order statistics by nearest rank."""

    smallest: int
    median: int
    p95: int
    largest: int


@dataclass(frozen=True)
class Bin:
    """Examples with `start` to `stop` tokens, both counted in; `stop` None: without end."""

    start: int
    stop: int | None
    count: int


def take_sample(plan: Plan, encoder: Encoder, options: SegmentOptions, *, first: int, size: int = 2000) -> Sample:
    """Encode the segments of epoch 0 from the first on until they hold `size` examples or the epoch ends.

    Args:
        first: how many examples to keep whole; the sample holds at least these.
        size: a segment alone may be larger (`data.window`); then it is cut here.

    Raises:
        RequestError: a row that cannot be read, aligned or encoded, unless such rows are skipped.
    """
    size = max(size, first)
    whole: list[Encoded] = []
    examples: list[Measured] = []
    packed_rows, position, walk = 0, Position(), Walk(plan)
    while position.epoch == 0 and len(examples) < size:
        segment, position = walk.step(position)
        items = read_segment(plan, segment, options)[:size]
        kept_lengths = []
        for item, encoding in zip(items, encode_all(plan.sets, items, encoder, options), strict=True):
            if encoding is None:
                examples.append(Measured(item.set, 0, 0, 0, item.counter))
                continue
            pieces = split(encoding, options.cutoff) if encoder.splits else [encoding]
            examples.append(_measure(item.set, pieces, options.cutoff))
            if examples[-1].dropped is None:
                kept_lengths += [part.stop - part.start for piece in pieces for part in piece.parts]
            if len(whole) < first:
                whole.append(Encoded(encoding.input_ids, encoding.labels, item.set, item.row))
        packed_rows += len(pack(kept_lengths, options.cutoff))
    return Sample(tuple(whole), tuple(examples), packed_rows, position.epoch > 0 and len(examples) <= size)


def _measure(set_index: int, pieces: Sequence[Encoding], cutoff: int) -> Measured:
    """One example; a long text has several pieces, which overlap by a token that is trained in the first of the two."""
    return Measured(
        set_index,
        sum(len(piece.input_ids) for piece in pieces) - (len(pieces) - 1),
        pieces[0].cut,
        sum(label >= 0 for piece in pieces for label in piece.labels[1:]),
        drop_reason(pieces[0], cutoff),
    )


def measure_lengths(lengths: Sequence[int]) -> Lengths:
    """Order statistics of at least one length."""
    ordered = sorted(lengths)
    return Lengths(ordered[0], _percentile(ordered, 50), _percentile(ordered, 95), ordered[-1])


def histogram(lengths: Sequence[int], cutoff: int, bins: int = 12) -> list[Bin]:
    """Up to `bins` bins of one round width to the 99th percentile, one for the tail, one for what passes the cutoff.

    The cutoff is always a border, so that no bin mixes what is trained on with what is not.
    """
    ordered = sorted(lengths)
    top = min(_percentile(ordered, 99), cutoff)
    width = _round_width(top / bins, cutoff)
    starts = [1 + width * index for index in range(-(-top // width))]
    ends: list[int | None] = [start + width - 1 for start in starts]
    if ends[-1] is not None and ends[-1] >= cutoff:
        ends[-1] = cutoff
    elif ordered[-1] > (ends[-1] or 0):  # the tail
        starts.append(1 + width * len(starts))
        ends.append(cutoff if ordered[-1] > cutoff else None)
    if ordered[-1] > cutoff:
        starts.append(cutoff + 1)
        ends.append(None)
    return [
        Bin(start, end, sum(start <= length and (end is None or length <= end) for length in ordered))
        for start, end in zip(starts, ends, strict=True)
    ]


def _percentile(ordered: Sequence[int], percent: int) -> int:
    return ordered[-(-percent * len(ordered) // 100) - 1]


def _round_width(least: float, cutoff: int) -> int:
    """A power of two, or 1, 2 or 5 times a power of ten: not below `least`, not much above, a divisor of the cutoff."""
    powers = {2**n for n in range(64)} | {digit * 10**n for n in range(18) for digit in (1, 2, 5)}
    widths = sorted(width for width in powers if width >= least)
    return next((width for width in widths if width <= 2 * least and cutoff % width == 0), widths[0])
