"""Rewards by a Python function of the user's.

It runs in a process of its own: what hangs there (a regular expression that goes astray holds Python's lock) can be
ended, and what it imports stays out of the worker.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rayloom.errors import JobError, RequestError
from rayloom.rollout.rewards.config import FunctionReward
from rayloom.rollout.rewards.source import Answered, checked_scores

_START_SECONDS = 120.0


def split_path(path: str, key: str) -> tuple[Path, str]:
    """File and function of `FILE.py:FUNCTION`, the file absolute.

    Raises:
        RequestError: it is not of this form, or there is no such file.
    """
    file, colon, name = path.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise RequestError(f"{key}: {path!r} must be FILE.py:FUNCTION, such as rewards.py:score")
    found = Path(file).expanduser().absolute()
    if not found.is_file():
        raise RequestError(f"{key}: no such file: {found}")
    return found, name


def check_function(path: str, key: str) -> None:
    """Load the function once, to tell what is wrong before anything starts.

    Raises:
        RequestError: no such file or function, or the file raises.
    """
    file, name = split_path(path, key)
    try:
        _load(file, name)
    except (Exception, SystemExit) as error:
        raise RequestError(f"{key}: {_said(error, file)}") from None


class FunctionScore:
    """The function, in a process that is started with the first call and ends with this one."""

    def __init__(self, config: FunctionReward, key: str) -> None:
        self._path, self._name = split_path(config.path, key)
        self._who = f"the reward {config.path}"
        self._timeout = config.timeout
        self._process: Any = None
        self._pipe: Any = None

    def score(self, answered: Sequence[Answered]) -> list[float]:
        columns = ([one.prompt for one in answered], [one.answer for one in answered],
                   [one.reference for one in answered])  # fmt: skip
        if self._process is None:
            self._start()
        try:
            self._pipe.send(columns)
        except OSError:
            raise JobError(f"{self._who} has ended its process; exit code {self._process.exitcode}") from None
        kind, found = self._receive(self._timeout, f"{len(answered)} answers")
        if kind == "error":
            raise JobError(f"{self._who} raised: {found}")
        return checked_scores(found, answered, self._who)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._path, self._name), daemon=True)
        self._process.start()
        theirs.close()
        kind, found = self._receive(_START_SECONDS, "to be loaded")
        if kind == "error":
            raise JobError(f"{self._who} cannot be loaded: {found}")

    def _receive(self, seconds: float, what: str) -> tuple[str, Any]:
        try:
            if self._pipe.poll(seconds):
                found: tuple[str, Any] = self._pipe.recv()
                return found
        except EOFError:
            code = self._process.exitcode
            raise JobError(f"{self._who} ended its process ({what}); exit code {code}") from None
        self.close()
        raise JobError(
            f"the trainer waited {seconds:g} s for {self._who} ({what}); raise its timeout or make it faster"
        )


def _serve(pipe: Any, file: Path, name: str) -> None:
    """The other process: load, then answer call after call."""
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
            pipe.send(("scores", [float(score) for score in found] if _are_numbers(found) else repr(found)[:200]))
        except BaseException as error:
            pipe.send(("error", _said(error, file)))


def _are_numbers(found: Any) -> bool:
    try:
        return all(isinstance(float(score), float) for score in found)
    except (TypeError, ValueError):
        return False


def _load(file: Path, name: str) -> Callable[..., Any]:
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
    return function


def _said(error: BaseException, file: Path) -> str:
    """The error in one line, with the line of the user's file where it was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f"{file}:{lines[-1]}" if lines else str(file)
    text = str(error) if type(error) is LookupError else f"{type(error).__name__}: {error}"
    return f"{where}: {text}"
