"""Parts of a step: nested ones do not count twice."""

from __future__ import annotations

import pytest

from rayloom.train import clock
from rayloom.train.clock import StepClock


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
