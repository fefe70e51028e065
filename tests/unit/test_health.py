"""The states of an engine: whatever happens, only new weights make one that started anew healthy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloom.rollout.health import Health, State

STEPS: dict[str, Callable[[Health], Health]] = {
    "booted": Health.booted,
    "outdated": Health.outdated,
    "synced": lambda health: health.synced(7),
    "late": Health.late,
    "died": Health.died,
    "restarted": Health.restarted,
}
# From each state, what can happen and where it leads; written out, not derived.
TABLE = {
    State.STARTING: {"booted": State.STALE, "late": State.SUSPECT, "died": State.DEAD},
    State.STALE: {"outdated": State.STALE, "synced": State.HEALTHY, "late": State.SUSPECT, "died": State.DEAD},
    State.HEALTHY: {"outdated": State.STALE, "late": State.SUSPECT, "died": State.DEAD},
    State.SUSPECT: {"died": State.DEAD},
    State.DEAD: {"restarted": State.STARTING, "died": State.DEAD},
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", STEPS)
def test_every_step_from_every_state(state: State, step: str) -> None:
    health = Health(state, version=None)
    if step in TABLE[state]:
        assert STEPS[step](health).state is TABLE[state][step]
    else:
        with pytest.raises(ValueError, match=f"an engine that is {state.value} cannot be {step}"):
            STEPS[step](health)


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=60))
def test_between_a_death_and_health_there_is_always_a_sync(steps: list[str]) -> None:
    health, since_death = Health(), []
    for step in steps:
        try:
            health = STEPS[step](health)
        except ValueError:
            continue
        since_death = [] if health.state is State.DEAD else [*since_death, step]
        if health.state is State.HEALTHY:
            assert since_death[-1] == "synced"
            assert health.version == 7
            assert "booted" in since_death
        if health.state in (State.STARTING, State.DEAD):
            assert health.version is None


def test_restarts_are_counted() -> None:
    health = Health()
    for _ in range(3):
        health = health.died().restarted().booted().synced(1)
    assert health == Health(State.HEALTHY, 1, 3)
