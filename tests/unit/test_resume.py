"""Stop anywhere, go on with any number of workers: the sequence of rows is that of a run that was never stopped.

The whole way of a row without Ray: walk, token rows, deal, the workers' counts, the position, and from there again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_walk import GROUPS, groups_of, plans, walk

from rayloom.data.deal import deal
from rayloom.data.plan import Plan, Position
from rayloom.data.rows import Encoded, position_from, row_id, segment_table
from rayloom.train.meter import BatchCount

Name = tuple[int, int]


def blocks(plan: Plan, start: Position, capacity: int | None) -> Iterator[pa.Table]:
    """The stream from `start` on; an example has one to three tokens."""
    for number, segment in enumerate(walk(plan).segments(start)):
        addresses = zip(segment.sets.tolist(), segment.chunks.tolist(), segment.rows.tolist(), strict=True)
        examples = [Encoded([1] * (1 + r % 3), [1] * (1 + r % 3), s, row_id(c, r)) for s, c, r in addresses]
        table = segment_table(segment, examples, [], capacity, plan.seed)
        yield table.slice(start.row) if number == 0 else table


def train(plan: Plan, start: Position, workers: int, batch: int, steps: int | None, capacity: int | None):
    """(names of the examples in stream order, the position after `steps`)."""
    shares = [deal(blocks(plan, start, capacity), rank, workers, batch) for rank in range(workers)]
    names: list[Name] = []
    behind = None
    for tables in itertools.islice(zip(*shares, strict=True), steps):
        counts = []
        for table in tables:
            counts.append(BatchCount(len(plan.sets)))
            counts[-1].add(table)
        names += [name for count in counts for name in count.names]
        behind = max(count.behind for count in counts)
    return names, position_from(behind) if behind else start


@given(
    plan=plans(),
    group=GROUPS,
    workers=st.tuples(*[st.integers(1, 4)] * 3),
    batches=st.tuples(*[st.integers(1, 4)] * 3),
    stops=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    capacity=st.none() | st.integers(3, 9),
)
def test_stopped_twice_and_gone_on_with_other_workers(plan, group, workers, batches, stops, capacity):
    with groups_of(group):
        whole, _ = train(plan, Position(), 1, 1, None, capacity)
        first, position = train(plan, Position(), workers[0], batches[0], stops[0], capacity)
        second, position = train(plan, position, workers[1], batches[1], stops[1], capacity)
        rest, _ = train(plan, position, workers[2], batches[2], None, capacity)
    assert first + second + rest == whole
