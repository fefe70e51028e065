"""`rayloom data prepare`: a job's data sets tokenized on the cluster, once, into stores (`data/store.py`)."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import Progress

from rayloom.config.job import JobConfig
from rayloom.data.plan import DataSet, Plan
from rayloom.data.rows import REFUSED, judgement
from rayloom.data.segment import Encoder, Item, SegmentOptions, encode_all, read_chunk
from rayloom.data.store import CHUNKS_PER_FILE, SCHEMA, files_of, find_store, finish, store_folder, write_file
from rayloom.data.walk import count_chunk
from rayloom.errors import RequestError
from rayloom.stages.prepare import prepare_data, segment_options, store_root
from rayloom.train.ray_session import prepare_environment, ray_session

FILE_SECONDS = 3600.0


def prepare(job: JobConfig, console: Console) -> None:
    """Make the stores of all data sets of `data.train` that have none yet.

    Raises:
        RequestError: data that cannot be read, or a bad row where such rows are not skipped.
    """
    root = store_root(job)
    if root is None:
        raise RequestError(f"data.store: name a folder for the tokens; output_dir is an address ({job.output_dir})")
    prepare_environment()
    plan, encoder = prepare_data(job)
    options = segment_options(job)
    key = encoder.key()
    missing = []
    for number, data_set in enumerate(plan.sets):
        if found := find_store(root, data_set, key, options.cutoff):
            console.print(f"{data_set.name}: is prepared already in {found}", soft_wrap=True, highlight=False)
        else:
            missing.append((number, data_set, store_folder(root, data_set, key, options.cutoff)))
    if not missing:
        return
    with ray_session(verbose=False):
        for number, data_set, folder in missing:
            started = time.perf_counter()
            rows, tokens = _prepare_set(plan, number, folder, encoder, options, console)
            finish(folder, {"set": data_set.name, "rows": rows, "tokens": tokens, "fingerprint": data_set.fingerprint})
            seconds = time.perf_counter() - started
            console.print(
                f"{data_set.name}: {rows:,} rows, {tokens:,} tokens in {seconds:.0f} s, in {folder}",
                soft_wrap=True,
                highlight=False,
            )


def _prepare_set(
    plan: Plan, number: int, folder: Path, encoder: Encoder, options: SegmentOptions, console: Console
) -> tuple[int, int]:
    """(rows, tokens) of one set. Some more files than there are CPUs are in work at a time."""
    import ray

    folder.mkdir(parents=True, exist_ok=True)
    data_set = plan.sets[number]
    prepare_file: Any = ray.remote(_prepare_file)
    shared = ray.put((data_set, encoder, options))
    at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(range(files_of(data_set)))
    running: list[Any] = []
    rows = tokens = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(data_set.name, total=len(waiting))
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(prepare_file.remote(shared, number, waiting.pop(0), str(folder)))
            done, running = ray.wait(running, timeout=FILE_SECONDS)
            if not done:
                raise RequestError(f"{data_set.name}: no file was prepared within {FILE_SECONDS:g} s")
            for reference in done:
                made = ray.get(reference)
                if isinstance(made, RequestError):  # as a value: Ray hands on an exception's text only
                    raise made
                rows, tokens = rows + made[0], tokens + made[1]
                progress.advance(task)
    return rows, tokens


def _prepare_file(
    shared: tuple[DataSet, Encoder, SegmentOptions], number: int, file: int, folder: str
) -> tuple[int, int] | RequestError:
    """Tokenize the chunks of one file of the store; (rows, tokens)."""
    data_set, encoder, options = shared
    sided = replace(options, held_out=options.held_out or 1.0)  # jobs may hold out another share, or none
    tables = []
    try:
        for index in range(file * CHUNKS_PER_FILE, min((file + 1) * CHUNKS_PER_FILE, data_set.chunks)):
            chunk = data_set.chunk(index)
            items = read_chunk(data_set, number, chunk, range(count_chunk(data_set, chunk)), sided)
            tables.append(_encode(data_set, number, items, encoder, options))
    except RequestError as error:
        return error
    write_file(Path(folder), file, tables)
    rows = sum(table.num_rows for table in tables)
    return rows, sum(len(table["input_ids"].combine_chunks().flatten()) for table in tables)


def _encode(data_set: DataSet, number: int, items: list[Item], encoder: Encoder, options: SegmentOptions) -> pa.Table:
    sets = [data_set] * (number + 1)  # an item names its set by number
    rows = []
    for item, encoding in zip(items, encode_all(sets, items, encoder, options), strict=True):
        counter = item.counter
        if encoding is not None and encoding.fault is not None:
            counter = REFUSED
        rows.append(
            {
                "input_ids": encoding.input_ids if encoding else [],
                "labels": encoding.labels if encoding else [],
                "cut": encoding.cut if encoding else 0,
                "border": encoding.border if encoding else 0,
                "desirable": judgement(encoding.desirable if encoding else None),
                "answer": encoding.answer if encoding else None,
                "counter": -1 if counter is None else counter,
                "side": item.side,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)
