"""From the job's `data` part to a `Plan`: find the files, tell the formats, fix the shares. No set is read through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rayloom.data.config import DataConfig, DatasetConfig
from rayloom.data.description import DescribedSet, Description, read_descriptions
from rayloom.data.files import DataFile, count_rows, estimate_rows, locate, place, read_rows
from rayloom.data.formats import FORMATS, Converter, Row, detect_format, load_converters, telling_columns
from rayloom.data.permutation import permutation
from rayloom.data.plan import DataSet, Plan
from rayloom.data.segment import SegmentOptions, read_chunk
from rayloom.data.walk import count_chunk
from rayloom.errors import RequestError

CHECKED_BYTES = 4 << 20
COUNTED_CHUNKS = 16
"""A set of so few chunks is counted at once: that takes no time, and its length is exact from the start."""


def make_plan(config: DataConfig, *, seed: int, epochs: int | None) -> Plan:
    """Locate every data set and fix the order of the stream.

    Raises:
        RequestError: a file that cannot be read, a format that cannot be told or is not known.
    """
    known = {**FORMATS, **(load_converters(config.converters) if config.converters else {})}
    described = read_descriptions(config.description) if config.description else {}
    sets = tuple(_locate(data_set, described, known, seed) for data_set in config.train)
    if config.mix == "concat":
        weights = tuple(float(data_set.estimated_rows) for data_set in sets)
    else:
        weights = tuple(1.0 if data_set.weight is None else data_set.weight for data_set in config.train)
    return Plan(sets, weights, config.mix, seed, config.window, epochs)


def check_rows(plan: Plan, options: SegmentOptions) -> None:
    """Parse and align the first few megabytes of every set, so that most faults show before anything is loaded.

    Raises:
        RequestError: one message for the first bad row of each set that has one, if such rows are not skipped.
    """
    faults: list[str] = []
    for number, data_set in enumerate(plan.sets):
        try:
            _check_set(data_set, number, options)
        except RequestError as error:
            faults += error.messages
    if faults:
        raise RequestError(*faults)


def _check_set(data_set: DataSet, number: int, options: SegmentOptions) -> None:
    checked = 0
    for index in range(data_set.chunks):
        if checked >= CHECKED_BYTES:
            return
        chunk = data_set.chunk(index)
        file, _ = data_set.locate(chunk)
        checked += file.size // file.chunks
        read_chunk(data_set, number, chunk, range(count_chunk(data_set, chunk)), options)


def _locate(
    config: DatasetConfig, described: dict[str, DescribedSet], known: dict[str, Converter], seed: int
) -> DataSet:
    description = Description.model_validate(
        config.model_dump(include=set(Description.model_fields), exclude_unset=True)
    )
    address, subset, split, folder, samples = (
        config.path,
        config.subset,
        config.split,
        config.folder,
        config.max_samples,
    )
    if config.path in described and not Path(config.path).exists():
        entry = described[config.path]
        if entry.refusal:
            raise RequestError(entry.refusal)
        # What the job says itself goes before what the description says.
        description = entry.description.model_copy(
            update={name: getattr(description, name) for name in description.model_fields_set}
        )
        address, subset, folder = entry.address, subset or entry.subset, folder or entry.folder
        split = config.split if "split" in config.model_fields_set else entry.split
        samples = samples or entry.num_samples
    files = locate(address, subset=subset, split=split, folder=folder)
    if description.format == "auto":
        description = description.model_copy(update={"format": _tell_format(files, config.path, description)})
    elif description.format not in known:
        raise RequestError(
            f"data.train: {config.name}: unknown format {description.format!r}; known are {', '.join(known)}"
        )
    whole = DataSet(config.name, description, files, max(1, estimate_rows(files)))
    if whole.chunks <= COUNTED_CHUNKS and whole.length is None:
        rows = sum(count_chunk(whole, chunk) for chunk in range(whole.chunks))
        whole = replace(whole, estimated_rows=rows, is_counted=True)
    return whole if samples is None else _sample(whole, samples, seed)


def _tell_format(files: tuple[DataFile, ...], path: str, description: Description) -> str:
    """The format of the first row that can be read, in the first chunk that has rows."""
    for file in files:
        for chunk in range(file.chunks):
            rows = read_rows(file, chunk, range(count_rows(file, chunk)))
            for number, raw in enumerate(rows):
                if raw.columns is not None:
                    return _format_of(raw.columns, place(file, chunk, number), path, description)
            if rows:
                raise RequestError(f"{place(file, chunk, 0)}: {rows[0].fault}")
    raise RequestError(f"{path}: is empty; a data set needs at least one row")


def _format_of(row: Row, where: str, path: str, description: Description) -> str:
    name = detect_format(row, description)
    if name is None:
        raise RequestError(
            f"{where}: cannot tell the format of {path} from the columns {', '.join(map(repr, row))}; "
            f"known are {telling_columns()}, or name a `format`"
        )
    return name


def _sample(data_set: DataSet, rows: int, seed: int) -> DataSet:
    """The first chunks of a random order that hold `rows` rows; no more chunks are counted than that takes."""
    chosen, found = [], 0
    for chunk in permutation(data_set.chunks, seed, data_set.name, "sample"):
        count = count_chunk(data_set, int(chunk))
        if count:
            chosen.append(int(chunk))
            found += count
        if found >= rows:
            last_rows = count - (found - rows)
            return replace(data_set, estimated_rows=rows, chosen=tuple(chosen), last_rows=last_rows)
    return data_set
