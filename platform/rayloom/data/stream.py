"""The stream as a Ray Data pipeline: segments in order, worked on in parallel.

    numbers of segments -> (one task each) read, align, template, tokenize, pack -> blocks of token rows, in order

`preserve_order` keeps what the plan fixed whichever task ends first. Resuming starts with the position's segment;
nothing before it is read. How the rows reach the workers is said in `deal.py`.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from rayloom.data.plan import Plan, Position
from rayloom.data.rows import SCHEMA, error_table
from rayloom.data.segment import Encoder, encode_segment
from rayloom.errors import RequestError


class _Segments(Datasource):
    """The numbers 0, 1, 2 ... one read task each: what there is to do, in order."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=1, size_bytes=8, input_files=None, exec_stats=None)
        return [ReadTask(partial(_number, number), metadata) for number in range(self._count)]


def _number(number: int) -> list[pa.Table]:
    return [pa.table({"number": [number]})]


class _EncodeSegment:
    """The map step: the number of a segment -> its token rows. The plan is held by reference, not sent each time."""

    def __init__(self, plan: ray.ObjectRef, encoder: Encoder, start: Position, options: dict[str, Any]) -> None:
        self._plan = plan
        self._encoder = encoder
        self._start = start
        self._options = options

    def __call__(self, numbers: pa.Table) -> pa.Table:
        return pa.concat_tables([SCHEMA.empty_table(), *(self._encode(n) for n in numbers["number"].to_pylist())])

    def _encode(self, number: int) -> pa.Table:
        plan: Plan = ray.get(self._plan)
        epoch, segment = plan.segment_after(self._start, number)
        try:
            table = encode_segment(plan, epoch, segment, self._encoder, **self._options)
        except RequestError as error:
            return error_table(error)
        return table.slice(self._start.row) if number == 0 else table


def build_stream(
    plan: Plan,
    encoder: Encoder,
    start: Position,
    *,
    segments: int,
    cutoff: int,
    packing: bool,
    task_cpus: float,
    concurrency: int,
) -> ray.data.Dataset:
    """A lazy Ray Data pipeline of token rows (`rayloom.data.rows.SCHEMA`) from `start` on.

    Args:
        segments: how many segments to make, the first being `start`'s.
        task_cpus: CPUs that each task reserves; 0 where the workers hold all there are.
        concurrency: tasks at a time.
    """
    context = copy.copy(ray.data.DataContext.get_current())
    context.execution_options = copy.copy(context.execution_options)
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = -1  # a trainer may evaluate or save for as long as it likes
    context.enable_progress_bars = False
    # One block a segment, however large: a split block would be packed in two.
    context.target_max_block_size = None
    encode = _EncodeSegment(ray.put(plan), encoder, start, {"cutoff": cutoff, "packing": packing})
    tasks: dict[str, Any] = {"num_cpus": task_cpus, "compute": ray.data.TaskPoolStrategy(size=concurrency)}
    with ray.data.DataContext.current(context):
        # The same resources and concurrency, so that Ray makes one task of the two steps.
        segment_numbers = ray.data.read_datasource(_Segments(segments), override_num_blocks=segments, **tasks)
        return segment_numbers.map_batches(encode, batch_size=None, batch_format="pyarrow", **tasks)
