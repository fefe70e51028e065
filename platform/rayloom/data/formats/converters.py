"""Formats of the user's own: a Python file with a dict `CONVERTERS`, from a name to a function.

    from rayloom.data.example import Example, Message

    def from_quiz(row, description):
        return Example((Message("user", row["q"]), Message("assistant", row["a"])))

    CONVERTERS = {"quiz": from_quiz}

What a function raises is a fault of the row.
"""

from __future__ import annotations

import inspect
import runpy
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from rayloom.data.description import Description
from rayloom.data.example import Example
from rayloom.data.formats.fields import Converter, Row, check_example
from rayloom.errors import RequestError

_BUILT_IN = ("auto", "alpaca", "sharegpt", "openai", "text")


def load_converters(path: str | Path) -> dict[str, Converter]:
    """The converters in a file, each made to raise `ValueError` whatever goes wrong in it. Cheap to call for every
    row: the file is run once, and again only when it has changed.

    Raises:
        RequestError: the file is missing or fails when it is run, has no `CONVERTERS`, or gives a name that is taken
            or that is no function of (row, description).
    """
    file = Path(path).expanduser()
    try:
        changed = file.stat().st_mtime_ns
    except OSError:
        raise RequestError(f"data.converters: {file}: no such file") from None
    return _load(file, changed)


@cache
def _load(file: Path, changed: int) -> dict[str, Converter]:
    """`changed`, the file's time, only tells one state of the file from another."""
    found = _run(file).get("CONVERTERS")
    where = f"data.converters: {file}"
    if not isinstance(found, dict) or not found:
        raise RequestError(f"{where}: has no dict CONVERTERS, such as CONVERTERS = {{'quiz': from_quiz}}")
    for name, function in found.items():
        if not isinstance(name, str) or not _takes_row_and_description(function):
            raise RequestError(f"{where}: CONVERTERS[{name!r}] must be a function of (row, description)")
        if name in _BUILT_IN:
            raise RequestError(f"{where}: CONVERTERS[{name!r}]: Rayloom has a format of that name; choose another")
    return {name: _guarded(name, function, file) for name, function in found.items()}


def _run(file: Path) -> dict[str, Any]:
    try:
        return runpy.run_path(str(file))
    except SyntaxError as error:
        raise RequestError(f"data.converters: {error.filename}:{error.lineno}: not Python: {error.msg}") from None
    except Exception as error:  # the user's code may raise anything
        raise RequestError(
            f"data.converters: {_place(error, file)}: fails when it is run: {type(error).__name__}: {error}"
        ) from None


def _takes_row_and_description(function: Any) -> bool:
    try:
        inspect.signature(function).bind({}, Description())
    except TypeError:
        return False
    except ValueError:  # a function in C that does not tell
        return True
    return True


def _guarded(name: str, function: Callable[[Row, Description], Any], file: Path) -> Converter:
    def convert(row: Row, description: Description) -> Example:
        try:
            example = function(row, description)
            if not isinstance(example, Example):
                raise ValueError(f"converter {name!r} returned {type(example).__name__}, not Example")
            check_example(example, prompts=description.prompts_only)
        except ValueError:
            raise
        except Exception as error:  # the user's code may raise anything; here it is a fault of the row
            raise ValueError(
                f"converter {name!r} failed at {_place(error, file)}: {type(error).__name__}: {error}"
            ) from error
        return example

    return convert


def _place(error: Exception, file: Path) -> str:
    """The last line of the user's file that the error came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1]}" if lines else str(file)
