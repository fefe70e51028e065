"""Statistics of whole data sets: one pass over every row, in parallel; a few numbers of each example are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayloom.data.plan import Plan, Segment
from rayloom.data.rows import DROP_REASONS
from rayloom.data.segment import Encoder, SegmentOptions, drop_reason, encode_all, read_segment

SCHEMA = pa.schema(
    {
        "set": pa.int32(),
        "tokens": pa.int32(),  # of the whole example, before it is cut
        "cut": pa.int32(),
        "trained": pa.int32(),
        "dropped": pa.int8(),  # which of `DROP_REASONS`; -1: it is trained on
        "content": pa.uint64(),  # a hash of its tokens
        "error": pa.string(),
    }
)
_NO_CUTOFF = 2**31 - 1
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class MeasureSegment:
    """The work of `rayloom data stats`: a segment -> numbers of each of its examples."""

    encoder: Encoder
    options: SegmentOptions
    schema: pa.Schema = SCHEMA

    def __call__(self, plan: Plan, segment: Segment) -> pa.Table:
        """One row for each example of the segment; bad rows are counted, not raised, where they are skipped."""
        options = replace(self.options, cutoff=_NO_CUTOFF)
        items = read_segment(plan, segment, options)
        rows = []
        for item, encoding in zip(items, encode_all(plan.sets, items, self.encoder, options), strict=True):
            if encoding is None:
                numbers = (0, 0, 0, item.counter, 0)
            else:
                tokens = len(encoding.input_ids)
                lengths = [part.stop - part.start for part in encoding.parts]
                reason = drop_reason(encoding, _NO_CUTOFF)
                numbers = (
                    tokens,
                    0 if self.encoder.splits else sum(max(0, length - self.options.cutoff) for length in lengths),
                    sum(label >= 0 for label in encoding.labels[1:]),
                    -1 if reason is None else reason,
                    _hash(encoding.input_ids),
                )
            rows.append(dict(zip(SCHEMA.names, (item.set, *numbers), strict=False)))
        return pa.Table.from_pylist(rows, schema=SCHEMA)


def _hash(input_ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(np.asarray(input_ids, dtype=np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class SetStatistics:
    """What one data set holds."""

    name: str
    rows: int
    tokens: int
    """Of the examples that can be trained on, before any is cut."""
    trained: int
    longer: int
    """Examples that are longer than the cutoff."""
    tokens_over: int
    """Tokens of them that stand behind the cutoff."""
    duplicates: int
    """Examples with the same tokens as an earlier one."""
    percentiles: tuple[int, ...]
    """Lengths in tokens at `PERCENTILES`, by nearest rank."""
    dropped: dict[str, int]
    lengths: NDArray[np.int64]


def summarize(name: str, table: pa.Table) -> SetStatistics:
    """Statistics of one set's rows (`SCHEMA`)."""
    columns = {column: table[column].to_numpy() for column in ("tokens", "cut", "trained", "dropped", "content")}
    kept = columns["dropped"] < 0
    lengths = np.sort(columns["tokens"][kept].astype(np.int64))
    content = columns["content"][kept]
    ranks = [min(len(lengths) - 1, max(0, -(-percent * len(lengths) // 100) - 1)) for percent in PERCENTILES]
    return SetStatistics(
        name,
        table.num_rows,
        int(lengths.sum()),
        int(columns["trained"][kept].sum(dtype=np.int64)),
        int((columns["cut"][kept] > 0).sum()),
        int(columns["cut"][kept].sum(dtype=np.int64)),
        len(content) - len(np.unique(content)),
        tuple(int(lengths[rank]) for rank in ranks) if len(lengths) else (),
        {reason: int((columns["dropped"] == number).sum()) for number, reason in enumerate(DROP_REASONS)},
        lengths,
    )
