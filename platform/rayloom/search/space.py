"""What a search draws values from: read, drawn, put into a job. Pure functions; no Ray."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayloom.config.document import parse_value

Point = dict[str, Any]
"""A value for each key of the space, those included whose condition does not hold."""

KINDS = ("loguniform", "uniform", "randint", "choice", "grid")
_RANGES = ("loguniform", "uniform", "randint")
_TEXT = re.compile(r"\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)
_DIGITS = 6  # of a drawn number: enough, and a person can read it


@dataclass(frozen=True)
class Entry:
    """One key of the space."""

    key: str
    """As an override writes it."""
    kind: str
    arguments: tuple[Any, ...]
    """(low, high) of a range; else the values."""
    when: Mapping[str, Any] = field(default_factory=dict)
    """Keys and the value, or list of values, that they must have; else this key is left as the job has it."""

    @property
    def is_range(self) -> bool:
        """Whether its arguments are (low, high)."""
        return self.kind in _RANGES

    def draw(self, generator: random.Random) -> Any:
        """A value; of a `grid` as of a `choice`."""
        if self.kind not in _RANGES:
            return copy.deepcopy(generator.choice(self.arguments))
        low, high = self.arguments
        if self.kind == "randint":
            return generator.randint(low, high)
        if self.kind == "uniform":
            return shortened(generator.uniform(low, high))
        return shortened(math.exp(generator.uniform(math.log(low), math.log(high))))

    def value_of(self, proposal: Any) -> Any:
        """The value that a searcher's proposal stands for: of a `choice`, that of its number."""
        if self.kind not in _RANGES:
            return copy.deepcopy(self.arguments[int(proposal)])
        return int(proposal) if self.kind == "randint" else shortened(float(proposal))


def shortened(value: Any) -> Any:
    """A float with six digits; anything else as it is."""
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def parse_space(space: Mapping[str, Any]) -> list[Entry]:
    """Read `search.space`; keys without a condition come first, since conditions ask for them.

    Raises:
        ValueError: naming the key and what would be right.
    """
    entries = [_parse_entry(key, value) for key, value in space.items()]
    return sorted(entries, key=lambda entry: bool(entry.when))


def points(entries: Sequence[Entry], *, samples: int, seed: int, whole_grid: bool) -> Iterator[Point]:
    """What trials are made with, in their order: a pure function of the arguments.

    Args:
        samples: points of each combination of `grid` values.
        whole_grid: every combination once, of `choice` values too; `samples` and `seed` do not count.
    """
    generator = random.Random(seed)
    fixed = [entry for entry in entries if entry.kind == "grid" or whole_grid]
    combinations = itertools.product(*(entry.arguments for entry in fixed))
    keys = [entry.key for entry in fixed]
    chosen = [dict(zip(keys, values, strict=True)) for values in combinations]
    for _ in range(1 if whole_grid else samples):
        for combination in chosen:
            drawn = {entry.key: entry.draw(generator) for entry in entries if entry not in fixed}
            yield {**copy.deepcopy(combination), **drawn}


def corner_points(entries: Sequence[Entry]) -> Iterator[Point]:
    """Points at the borders: both ends of each range, and each of other values, beside the first of the other keys."""
    first = {entry.key: entry.arguments[0] for entry in entries}
    yield copy.deepcopy(first)
    for entry in entries:
        for corner in entry.arguments[1:]:
            yield copy.deepcopy({**first, entry.key: corner})


def _parse_entry(key: str, value: Any) -> Entry:
    if isinstance(value, str) and (match := _TEXT.fullmatch(value)):
        try:
            arguments = parse_value(f"[{match[2]}]")
        except ValueError:
            raise ValueError(f"{key}: what stands in the brackets of {value!r} cannot be read") from None
        return _checked(Entry(key, match[1], tuple(arguments)))
    if isinstance(value, dict):
        kinds = [name for name in value if name != "when"]
        when = value.get("when", {})
        if len(kinds) == 1 and isinstance(value[kinds[0]], list) and isinstance(when, dict):
            return _checked(Entry(key, kinds[0], tuple(value[kinds[0]]), when))
    cut = isinstance(value, str) and "(" in value and ")" not in value
    hint = "; within braces YAML ends a value at a comma, so put it in quotes" if cut else ""
    raise ValueError(
        f"{key}: write what it is drawn from as loguniform(1e-5, 1e-3), or as {{choice: [4, 8], "
        f"when: {{method.type: lora}}}}, not {value!r}{hint}"
    )


def _checked(entry: Entry) -> Entry:
    key, kind, arguments = entry.key, entry.kind, entry.arguments
    if kind not in KINDS:
        raise ValueError(f"{key}: unknown {kind!r}; known here: {', '.join(KINDS)}")
    if kind not in _RANGES:
        if not arguments:
            raise ValueError(f"{key}: {kind} is empty; give it the values to try")
        return entry
    numbers = [value for value in arguments if isinstance(value, int | float) and not isinstance(value, bool)]
    is_pair = len(arguments) == len(numbers) == 2
    if not is_pair or not -math.inf < numbers[0] < numbers[1] < math.inf:
        raise ValueError(f"{key}: {kind} takes two numbers, the lower one first, not {_shown(arguments)}")
    if kind == "randint" and not all(isinstance(value, int) for value in arguments):
        raise ValueError(f"{key}: randint takes whole numbers, not {_shown(arguments)}")
    if kind == "loguniform" and numbers[0] <= 0:
        raise ValueError(f"{key}: loguniform takes numbers above 0, not {_shown(arguments)}; use uniform")
    return entry


def _shown(arguments: Sequence[Any]) -> str:
    return f"({', '.join(map(str, arguments))})"
