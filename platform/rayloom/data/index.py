"""From the job's `data` part to a `Plan`: locate the chunks, tell the formats, work out the mixture."""

from __future__ import annotations

from rayloom.data.config import DataConfig, DatasetConfig
from rayloom.data.example import Example
from rayloom.data.files import Chunk, index_file, read_rows
from rayloom.data.formats import FORMATS, Row, detect_format, telling_columns
from rayloom.data.mixture import Mixture
from rayloom.data.plan import IndexedSet, Plan
from rayloom.errors import RequestError

CHECKED_BYTES = 4 << 20


def make_plan(config: DataConfig, *, seed: int, epochs: int | None) -> Plan:
    """Locate every data set and fix the order of the stream.

    Raises:
        RequestError: a file that cannot be read, or whose format cannot be told.
    """
    sets = tuple(_locate(data_set) for data_set in config.train)
    weights = tuple(1.0 if data_set.weight is None else data_set.weight for data_set in config.train)
    mixture = Mixture(tuple(data_set.length for data_set in sets), weights, config.mix)
    return Plan(sets, mixture, seed, config.window, epochs)


def check_rows(plan: Plan) -> None:
    """Parse and align the first few megabytes of every set, so that most faults show before anything is loaded.

    Raises:
        RequestError: one message for the first bad row of each set that has one.
    """
    faults: list[str] = []
    for data_set in plan.sets:
        try:
            checked = 0
            for chunk in data_set.chunks:
                if checked >= CHECKED_BYTES:
                    break
                checked += chunk.stop - chunk.start
                read_examples(data_set, chunk, range(chunk.rows))
        except RequestError as error:
            faults += error.messages
    if faults:
        raise RequestError(*faults)


def read_examples(data_set: IndexedSet, chunk: Chunk, rows: range | list[int]) -> list[Example]:
    """Read rows of one chunk (numbers within the chunk) and bring them into the standard form.

    Raises:
        RequestError: naming file, line, row and what is wrong with it.
    """
    return [align(row, data_set.format, place) for place, row in read_rows(chunk, rows)]


def align(row: Row, format_name: str, place: str) -> Example:
    """One raw row in the standard form; `place` begins the message where that cannot be."""
    try:
        return FORMATS[format_name](row)
    except ValueError as error:
        raise RequestError(f"{place}: {error} (read as {format_name})") from None


def _locate(config: DatasetConfig) -> IndexedSet:
    chunks = tuple(index_file(config.path))
    format_name: str | None = config.format
    if format_name == "auto":
        ((place, row),) = read_rows(chunks[0], [0])
        format_name = detect_format(row)
        if format_name is None:
            raise RequestError(
                f"{place}: cannot tell the format of {config.path} from the columns {', '.join(map(repr, row))}; "
                f"known are {telling_columns()}, or name a `format`"
            )
    assert format_name is not None
    return IndexedSet(config.name, format_name, chunks)
