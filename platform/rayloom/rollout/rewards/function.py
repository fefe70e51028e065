"""Rewards by a Python function of the user's.

It runs in a process of its own: what hangs there (a regular expression that goes astray holds Python's lock) can be
ended, and what it imports stays out of the worker.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayloom.errors import JobError, RequestError
from rayloom.rollout.rewards.config import FunctionReward
from rayloom.rollout.rewards.function_process import serve
from rayloom.rollout.rewards.source import Answered, checked_scores

_LOAD_SECONDS = 120.0


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


def check_function(config: FunctionReward, key: str) -> None:
    """Load the function once, to tell what is wrong before anything starts.

    Raises:
        RequestError: no such file or function, it does not take three arguments, the file raises, or it takes too long.
    """
    function = FunctionScore(config, key)
    try:
        function.load()
    except JobError as error:
        raise RequestError(f"{key}: {error}") from None
    finally:
        function.close()


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
        self.load()
        try:
            self._pipe.send(columns)
        except OSError:
            raise JobError(f"{self._who} has ended its process; exit code {self._process.exitcode}") from None
        kind, found = self._receive(self._timeout, f"{len(answered)} answers", "raise its timeout or make it faster")
        if kind == "error":
            raise JobError(f"{self._who} raised: {found}")
        if kind == "other":
            raise JobError(f"{self._who} must give a list of {len(answered)} numbers, not {found}")
        return checked_scores(found, answered, self._who)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def load(self) -> None:
        """Start the process, if it does not run yet, and wait until it has the function.

        Raises:
            JobError: it has not.
        """
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._path, self._name), daemon=True)
        self._process.start()
        theirs.close()
        kind, found = self._receive(_LOAD_SECONDS, "to be loaded", "what it does when it is imported must be quick")
        if kind == "error":
            raise JobError(f"{self._who} cannot be loaded: {found}")

    def _receive(self, seconds: float, what: str, advice: str) -> tuple[str, Any]:
        try:
            if self._pipe.poll(seconds):
                found: tuple[str, Any] = self._pipe.recv()
                return found
        except EOFError:
            self._process.join(5)  # its end of the pipe is closed before it has ended
            raise JobError(f"{self._who} ended its process ({what}); exit code {self._process.exitcode}") from None
        self.close()
        raise JobError(f"the trainer waited {seconds:g} s for {self._who} ({what}); {advice}")
