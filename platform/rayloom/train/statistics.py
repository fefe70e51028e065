"""`rayloom data stats`: every row of a job's data sets measured on the cluster, as a table and a picture."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rayloom.config.job import JobConfig
from rayloom.data.measure import PERCENTILES, MeasureSegment, SetStatistics, summarize
from rayloom.data.plan import Plan, Position
from rayloom.data.rows import raise_error
from rayloom.stages.prepare import prepare_data, segment_options
from rayloom.train.ray_session import prepare_environment, ray_session

_NAME = 24


def measure(job: JobConfig, console: Console) -> list[SetStatistics]:
    """One pass over every row of `data.train`, `mix` and weights aside.

    Raises:
        RequestError: data that cannot be read, or a bad row where such rows are not skipped.
    """
    prepare_environment()
    whole = job.data.model_copy(
        update={
            "mix": "concat",
            "held_out": 0.0,
            "train": [item.model_copy(update={"weight": None}) for item in job.data.train],
        }
    )
    train = job.train.model_copy(update={"max_steps": None, "epochs": 1})
    job = job.model_copy(update={"data": whole, "train": train})
    plan, encoder = prepare_data(job)
    with ray_session(verbose=False):
        tables = _tables(plan, MeasureSegment(encoder, segment_options(job)), console)
    table = pa.concat_tables(tables)
    return [
        summarize(data_set.name, table.filter(table["set"].to_numpy() == n)) for n, data_set in enumerate(plan.sets)
    ]


def _tables(plan: Plan, work: MeasureSegment, console: Console) -> list[pa.Table]:
    import ray

    from rayloom.data.stream import build_stream

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # this process runs the pipeline, and it tells at length

    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    segments = 2 + 5 * (plan.segments_left(Position()) or 1) // 4
    tables, start, done = [], Position(), 0
    stream = build_stream(plan, work, start, segments=segments, task_cpus=1, concurrency=cpus)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=plan.estimated_epoch_length)
        blocks: Iterable[Any] = stream.iter_batches(batch_size=None, batch_format="pyarrow")
        for block in blocks:
            raise_error(block)
            tables.append(block)
            done += block.num_rows
            progress.update(task, completed=done)
    return tables


def show(statistics: list[SetStatistics], cutoff: int, console: Console) -> None:
    """The table."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("data set", "rows", "tokens", *(f"p{p}" for p in PERCENTILES), "trained", "longer", "twice", "out")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for one in statistics:
        table.add_row(
            one.name if len(one.name) <= _NAME else one.name[: _NAME - 1] + "…",
            f"{one.rows:,}",
            f"{one.tokens:,}",
            *(f"{value:,}" for value in one.percentiles or ("-",) * len(PERCENTILES)),
            f"{100 * one.trained / max(1, one.tokens):.0f} %",
            f"{100 * one.longer / max(1, one.rows):.0f} %",
            f"{one.duplicates:,}",
            f"{sum(one.dropped.values()):,}",
        )
    console.print(table)
    console.print(
        f"p50 ... p99: lengths in tokens; trained: share of them; longer: examples above the cutoff of {cutoff:,} "
        "tokens; twice: examples with the same tokens as an earlier one; out: left out, reasons below",
        style="dim",
    )
    for one in statistics:
        for reason, count in one.dropped.items():
            if count:
                console.print(f"{one.name}: {count:,} left out: {reason}")


def draw(statistics: list[SetStatistics], cutoff: int, path: Path) -> None:
    """The picture: how the lengths of each set are distributed, and where the cutoff is."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    shown = [one for one in statistics if len(one.lengths)]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=130)
    longest = max((int(one.lengths[-1]) for one in shown), default=1)
    edges = np.unique(np.geomspace(1, max(2, longest) + 1, 60).astype(int))
    for one in shown:
        counts, _ = np.histogram(one.lengths, bins=edges)
        axes.stairs(counts / len(one.lengths), edges, label=f"{one.name} ({one.rows:,} rows)", linewidth=1.8)
    axes.axvline(cutoff, color="#c2571a", linestyle="--", linewidth=1.2, label=f"cutoff {cutoff:,}")
    axes.set(xscale="log", xlabel="tokens of an example", ylabel="share of the examples", title="Lengths")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
