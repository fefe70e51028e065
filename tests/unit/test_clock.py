"""Parts of a step: nested ones do not count twice."""

from __future__ import annotations

import pytest

from rayloom.train import clock
from rayloom.train.clock import RowClock, StepClock


@pytest.fixture
def ticks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    return now


def test_parts(ticks):
    watch = StepClock()
    with watch.part("data"):
        ticks[0] += 1
    ticks[0] += 100  # nobody's
    with watch.part("backward"):
        ticks[0] += 2
        with watch.part("forward"):
            ticks[0] += 4
        ticks[0] += 8
    watch.on_pre_optimizer_step(None, None, None)
    ticks[0] += 16
    watch.on_optimizer_step(None, None, None)
    watch.on_optimizer_step(None, None, None)
    assert watch.read(2) == {"data": 0.5, "forward": 2, "backward": 5, "optimizer": 8, "checkpoint": 0}
    assert set(watch.read(0).values()) == {0.0}


def test_a_part_that_fails_is_closed(ticks):
    watch = StepClock()

    def fail() -> None:
        with watch.part("forward"):
            ticks[0] += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    ticks[0] += 5
    assert watch.read(1)["forward"] == 1


def test_rows(ticks):
    parts = StepClock()
    rows = RowClock(parts)
    with rows.left_out():  # before the first step
        ticks[0] += 1000
    with parts.part("data"):
        ticks[0] += 7  # the first batch is no step's
    rows.start(100, 3)
    for _ in range(4):
        with parts.part("data"):
            ticks[0] += 1
        ticks[0] += 4
        rows.start(500, 5)  # changes nothing
    with rows.left_out():
        ticks[0] += 30
    row = rows.read(900, 7)
    assert (row["tokens_per_second"], row["data_wait"]) == (40, 0.2)
    assert row["step_seconds"] == {"data": 1, "forward": 0, "backward": 0, "optimizer": 0, "checkpoint": 0}
    ticks[0] += 10
    assert rows.read(1000, 8)["tokens_per_second"] == 10
