"""The stream as a Ray Data pipeline: segments in order, worked on in parallel.

    numbers 0, 1, 2 ... -> (one task each) ask the planner, do the work -> tables in order

To train, the work is to read, align, template, tokenize and pack (`segment.py`); to measure, to count (`measure.py`).

`preserve_order` keeps what the plan fixed whichever task ends first. Resuming starts with the position's segment;
nothing before it is read. How the rows reach the workers is said in `deal.py`.
"""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from rayloom.data.plan import Plan, Position, Segment
from rayloom.data.planner import Planner
from rayloom.data.rows import error_table
from rayloom.errors import JobError, RequestError

PLANNER_SECONDS = 600.0
SINGLE_TASKS = 4
SEGMENTS_PER_TASK = 8


class _Numbers(Datasource):
    """The numbers 0, 1, 2 ... : what there is to do, in order.

    The first tasks have one segment each, so that training starts soon; later ones have several, because between two
    tasks Ray Data leaves a process idle for about as long as a segment takes.
    """

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        super().__init__()
        self._ranges = ranges

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_numbers, start, stop),
                BlockMetadata(num_rows=stop - start, size_bytes=8 * (stop - start), input_files=None, exec_stats=None),
            )
            for start, stop in self._ranges
        ]


def task_ranges(first: int, segments: int) -> list[tuple[int, int]]:
    """Start and stop of each task's segments, of the segments from `first` to before `segments`."""
    single = min(segments, first + SINGLE_TASKS)
    return list(pairwise([*range(first, single), *range(single, segments, SEGMENTS_PER_TASK), segments]))


def _numbers(start: int, stop: int) -> list[pa.Table]:
    return [pa.table({"number": list(range(start, stop))})]


class SegmentWork(Protocol):
    """What is done with each segment, in a task. Sent to every task, so it is small."""

    @property
    def schema(self) -> pa.Schema:
        """Of the tables that it makes; it has a text column `error` (`rayloom.data.rows.error_table`)."""
        ...

    def __call__(self, plan: Plan, segment: Segment) -> pa.Table:
        """The table of one segment."""
        ...


class _DoSegment:
    """The map step: the number of a segment -> its table. What is large is held by reference, not sent each time."""

    def __init__(self, planner: Any, plan: ray.ObjectRef, work: ray.ObjectRef, skip: int) -> None:
        self._planner = planner
        self._plan = plan
        self._work = work
        self._skip = skip

    def __call__(self, numbers: pa.Table) -> pa.Table:
        work: SegmentWork = ray.get(self._work)
        return pa.concat_tables(
            [work.schema.empty_table(), *(self._do(work, n) for n in numbers["number"].to_pylist())]
        )

    def _do(self, work: SegmentWork, number: int) -> pa.Table:
        try:
            segment = ray.get(self._planner.segment.remote(number), timeout=PLANNER_SECONDS)
        except ray.exceptions.GetTimeoutError:
            raise JobError(
                f"a data task waited {PLANNER_SECONDS:g} s for the planner to count the rows of segment {number}"
            ) from None
        if segment is None:
            return work.schema.empty_table()
        if isinstance(segment, RequestError):
            return error_table(segment, work.schema)
        plan: Plan = ray.get(self._plan)
        try:
            table = work(plan, segment)
        except RequestError as error:
            return error_table(error, work.schema)
        return table.slice(self._skip) if number == 0 else table


def build_stream(
    plan: Plan,
    work: SegmentWork,
    start: Position,
    *,
    segments: int,
    task_cpus: float,
    concurrency: int,
    made: int = 0,
) -> ray.data.Dataset:
    """A lazy Ray Data pipeline of the tables that `work` makes of the segments from `start` on, in order.

    Args:
        segments: how many segments to make at most, the first being `start`'s; behind the last there are no rows.
        task_cpus: CPUs that each task reserves; 0 where the workers hold all there are.
        concurrency: tasks at a time.
        made: how many of the segments from `start` on have been made already; the pipeline begins behind them.
    """
    context = copy.copy(ray.data.DataContext.get_current())
    context.execution_options = copy.copy(context.execution_options)
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = -1  # a trainer may evaluate or save for as long as it likes
    context.enable_progress_bars = False
    # One block a task, however large.
    context.target_max_block_size = None
    planner = ray.remote(Planner).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote(plan, start)
    do = _DoSegment(planner, ray.put(plan), ray.put(work), start.row)
    tasks: dict[str, Any] = {"num_cpus": task_cpus, "compute": ray.data.TaskPoolStrategy(size=concurrency)}
    ranges = task_ranges(made, segments)
    with ray.data.DataContext.current(context):
        # The same resources and concurrency, so that Ray makes one task of the two steps.
        numbers = ray.data.read_datasource(_Numbers(ranges), override_num_blocks=len(ranges), **tasks)
        return numbers.map_batches(do, batch_size=None, batch_format="pyarrow", **tasks)
