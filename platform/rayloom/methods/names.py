"""Names of a model's modules, and the nearest to one that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from rayloom.errors import RequestError

_MOST = 12


def is_one_of(module: str, names: Iterable[str]) -> bool:
    """Whether one of the names is a module's whole name, or what stands behind one of its dots."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def modules_named(model: Any, names: Sequence[str], key: str) -> list[str]:
    """Whole names of all modules that `names` mean.

    Args:
        key: of the job file that holds the names.

    Raises:
        RequestError: one of them means no module; with the nearest that there are.
    """
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if not any(is_one_of(module, [name]) for module in known):
            raise RequestError(f"{key}: the model has no module {name!r}{nearest(name, known)}")
    return [module for module in known if is_one_of(module, names)]


def nearest(word: str, names: Iterable[str]) -> str:
    """`; did you mean "x"?` for the nearest last parts of the names, else what the last parts are.

    A name that ends in a number (`layers.3`) is left out: nobody misspells it.
    """
    ends = list(dict.fromkeys(end for name in names if not (end := name.rpartition(".")[2]).isdecimal()))
    last = word.rpartition(".")[2]
    close = difflib.get_close_matches(last, ends, n=3, cutoff=0.65) or [end for end in ends if last and last in end][:3]
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; known here: {short_list(ends)}"


def short_list(words: Sequence[str]) -> str:
    """The words with commas between them, and how many more there are beyond a dozen."""
    more = f" and {len(words) - _MOST} more" if len(words) > _MOST else ""
    return ", ".join(words[:_MOST]) + more
