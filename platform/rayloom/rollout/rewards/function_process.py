"""The process that a user's reward function runs in: imports nothing that is not needed there."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rayloom.rollout.rewards.source import as_numbers


def serve(pipe: Any, file: Path, name: str) -> None:
    """Load the function, then answer call after call, until the pipe is closed.

    Sends `("loaded", None)` once; for each call `("scores", numbers)`, or `("other", what was returned instead)`; what
    is raised, then or before, as `("error", text)`.
    """
    try:
        function = _load(file, name)
    except BaseException as error:
        pipe.send(("error", _said(error, file)))
        return
    pipe.send(("loaded", None))
    while True:
        try:
            columns = pipe.recv()
        except EOFError:
            return
        try:
            found = function(*columns)
            found = list(found) if isinstance(found, Iterator) else found  # a generator runs here, and may raise
            scores = as_numbers(found)
            pipe.send(("scores", scores) if scores is not None else ("other", repr(found)[:200]))
        except BaseException as error:
            pipe.send(("error", _said(error, file)))


def _load(file: Path, name: str) -> Callable[..., Any]:
    sys.path.insert(0, str(file.parent))  # as for a script: it may import the files beside it
    spec = importlib.util.spec_from_file_location(f"rayloom_reward_{file.stem}", file)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        there = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise LookupError(f"it has no function {name!r}; it has {there or 'none'}")
    function: Callable[..., Any] = found
    _check_arguments(function, name)
    return function


def _check_arguments(function: Callable[..., Any], name: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some that are written in C have none
        return
    try:
        signature.bind([], [], [])
    except TypeError as error:
        raise LookupError(
            f"{name}{signature} must take three arguments, (prompts, answers, references): {error}"
        ) from None


def _said(error: BaseException, file: Path) -> str:
    """The error in one line, with the line of the user's file where it was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f"{file}:{lines[-1]}" if lines else str(file)
    text = str(error) if type(error) is LookupError else f"{type(error).__name__}: {error}"
    return f"{where}: {text}"
