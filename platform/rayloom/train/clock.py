"""Where the time of the steps goes, and what a row of metrics says of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers

PARTS = ("data", "forward", "backward", "optimizer", "checkpoint")
"""Of every step; a trainer may name more."""


class StepClock(transformers.TrainerCallback):
    """Seconds of this process, by part of the step, since the last `read`.

    On a GPU the host runs ahead of the device, so a part there is how long the host waited in it. DeepSpeed makes its
    step within `backward`.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[tuple[str, float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside to a part, and not to the part around it."""
        self._begin(name)
        try:
            yield
        finally:
            self._end()

    def move(self, seconds: float, of: str, to: str) -> None:
        """Count to one part what was counted to another, within which it ran."""
        self._seconds[of] -= seconds
        self._seconds[to] += seconds

    def _begin(self, name: str) -> None:
        self._pause()
        self._open.append((name, time.perf_counter()))

    def _end(self) -> None:
        self._pause()
        self._open.pop()
        if self._open:
            self._open[-1] = (self._open[-1][0], time.perf_counter())

    def _pause(self) -> None:
        if self._open:
            name, since = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - since

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._open and self._open[-1][0] == "optimizer":  # DeepSpeed may say the one and not the other
            self._end()

    def read(self, steps: int) -> dict[str, float]:
        """Seconds of each part for one of `steps` steps; begins anew."""
        means = {name: seconds / max(1, steps) for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return means


class RowClock:
    """The time from one row of metrics to the next, and how fast the training was in it."""

    def __init__(self, parts: StepClock) -> None:
        self._parts = parts
        self._before: tuple[float, int, int] | None = None  # time, tokens and step of the row before

    def start(self, tokens: int, step: int) -> None:
        """The training begins at this step, with so many tokens behind it; later calls change nothing."""
        if self._before is None:
            self._parts.read(1)
            self._before = (time.perf_counter(), tokens, step)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What runs inside takes none of the training's time."""
        started = time.perf_counter()
        yield
        if self._before is not None:
            then, tokens, step = self._before
            self._before = (then + time.perf_counter() - started, tokens, step)

    def read(self, tokens: int, step: int) -> dict[str, Any]:
        """`tokens_per_second`, `data_wait` (a share of the time) and `step_seconds` by part, since the row before."""
        assert self._before is not None  # started before the first step
        now, (then, tokens_before, step_before) = time.perf_counter(), self._before
        self._before = (now, tokens, step)
        steps = step - step_before
        seconds = self._parts.read(steps)
        return {
            "tokens_per_second": (tokens - tokens_before) / (now - then),
            "data_wait": seconds["data"] * steps / (now - then),
            "step_seconds": seconds,
        }
