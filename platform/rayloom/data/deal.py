"""Dealing the stream to the workers: batch k of the job is rows k W B ... (k + 1) W B of the stream, whatever W is.

One dealer runs the pipeline and hands every worker every block, by reference: on a node all workers share one copy in
the object store. Each worker keeps its own rows by counting. Nothing is cut up again (Ray's own equal split would need
a task for every batch, drop the rows that are left over, and give each worker whatever block came next), and the
assignment is arithmetic: row i goes to worker (i // B) mod W.

The price: each node receives all token rows, about 12 bytes per token of the global batch and step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayloom.data.plan import Plan, Position
from rayloom.data.rows import SCHEMA, raise_error
from rayloom.errors import JobError

if TYPE_CHECKING:
    from rayloom.data.stream import SegmentWork

WAIT_SECONDS = 1800.0


@dataclass(frozen=True)
class StreamOrder:
    """A stream that is still to be built (`rayloom.data.stream.build_stream`). Whoever holds it need not load Ray
    Data."""

    plan: Plan
    work: SegmentWork
    start: Position
    segments: int
    task_cpus: float
    concurrency: int
    made: int = 0

    def blocks(self) -> Iterator[pa.Table]:
        """The stream's tables. It is built, and its first tasks start, when the first is asked for."""
        from rayloom.data.stream import build_stream  # this loads Ray Data

        yield from build_stream(**vars(self)).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


class _Dealer:
    """Runs the pipeline once and keeps each block until every worker has taken it. An actor, two threads a worker."""

    def __init__(self, stream: StreamOrder, workers: int, given: list[pa.Table]) -> None:
        self._blocks = chain(given, stream.blocks())
        self._workers = workers
        self._changed = threading.Condition()
        self._making = False
        self._made = 0
        self._kept: dict[int, tuple[ray.ObjectRef, int]] = {}
        self._end: int | None = None
        self._error: Exception | None = None

    def block(self, number: int) -> list[ray.ObjectRef]:
        """The block's reference in a list; an empty list behind the last one."""
        with self._changed:
            while self._made <= number and self._end is None:
                if self._error is not None:
                    raise self._error
                if self._making:
                    self._changed.wait()
                else:
                    self._make()
            if self._end is not None and number >= self._end:
                return []
            reference, takers = self._kept.pop(number)
            if takers + 1 < self._workers:
                self._kept[number] = (reference, takers + 1)
            return [reference]

    def _make(self) -> None:
        """Make the next block. The lock is held before and after, not while the pipeline works: who waits for an
        earlier block gets it."""
        self._making = True
        self._changed.release()
        table = reference = error = None
        try:
            table = next(self._blocks, None)
            reference = None if table is None else ray.put(table)
        except Exception as raised:  # kept: the other workers must hear of it too
            error = raised
        finally:
            self._changed.acquire()
            self._making = False
            self._changed.notify_all()
        if error is not None:
            self._error = error
        elif reference is None:
            self._end = self._made
        else:
            self._kept[self._made] = (reference, 0)
            self._made += 1


def start_dealer(stream: StreamOrder, workers: int, *given: pa.Table) -> Any:
    """Start the actor that deals a stream to `workers` workers; it ends when nobody holds it any more.

    It is there long before the workers are, and builds the stream when they ask for a block that is not given. It is on
    this process's own node: it must not die with another.

    Args:
        given: the first blocks, which have been made already; the stream is what follows them.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 2 * workers, "scheduling_strategy": here}
    return ray.remote(_Dealer).options(**options).remote(stream, workers, list(given))


def deal(blocks: Iterable[pa.Table], rank: int, workers: int, batch_rows: int) -> Iterator[pa.Table]:
    """The batches of worker `rank` of `workers`: rows i of the stream with (i // batch_rows) mod workers = rank.

    All workers get the same number of batches; where the stream ends within a global batch, a worker's last one has
    fewer rows, and may have none.
    """
    mine: list[pa.Table] = []
    row = 0
    for block in blocks:
        start = 0
        while start < block.num_rows:
            length = min(batch_rows - row % batch_rows, block.num_rows - start)
            if (row // batch_rows) % workers == rank:
                mine.append(block.slice(start, length))
            start, row = start + length, row + length
            if row % (batch_rows * workers) == 0:  # the global batch is whole
                yield pa.concat_tables(mine)
                mine = []
    if row % (batch_rows * workers):
        yield pa.concat_tables([SCHEMA.empty_table(), *mine])


@dataclass(frozen=True)
class Shard:
    """One worker's part of the stream."""

    dealer: Any
    rank: int
    workers: int

    def batches(self, batch_rows: int) -> Iterator[pa.Table]:
        """This worker's batches of `batch_rows` rows, in order (see `deal`). The first block is asked for with this
        call, not with the first batch that is taken: where it is not there yet, it is made while the model loads.

        Raises:
            JobError: no block came within `WAIT_SECONDS`.
            RequestError: a row that cannot be read or understood.
        """
        return deal(self._blocks(self.dealer.block.remote(0)), self.rank, self.workers, batch_rows)

    def first(self, examples: int, batch_rows: int) -> list[pa.Table]:
        """This worker's batches of the stream's first `examples` token rows, kept in memory; every worker gets as many.

        Raises:
            JobError, RequestError: as `batches`.
        """
        taken, rows = [], 0
        for block in self._blocks(self.dealer.block.remote(0)):
            full = block.filter(pc.greater(pc.list_value_length(block["input_ids"]), 0))
            taken.append(full.slice(0, examples - rows))
            rows += taken[-1].num_rows
            if rows == examples:
                break
        return list(deal(taken, self.rank, self.workers, batch_rows))

    def _blocks(self, first: Any) -> Iterator[pa.Table]:
        """Two blocks are on their way while a third is used. But none behind the first before that is used: where it
        was given, it is enough to begin with, and the pipeline's start would take the processor from the model's."""
        coming = deque([first])
        number = 0
        while True:
            try:
                references = ray.get(coming.popleft(), timeout=WAIT_SECONDS)
            except ray.exceptions.GetTimeoutError:
                raise JobError(
                    f"worker {self.rank} waited {WAIT_SECONDS:g} s for block {number} of the data stream; "
                    "the tasks that read and tokenize are stuck or starved of CPUs"
                ) from None
            if not references:
                return
            number += 1
            coming.extend(self.dealer.block.remote(ahead) for ahead in range(number + len(coming), number + 2))
            block = ray.get(references[0], timeout=WAIT_SECONDS)
            raise_error(block)
            yield block
