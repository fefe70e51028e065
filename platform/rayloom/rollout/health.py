"""The states of an engine. What restarts holds old weights, so from `DEAD` and `STARTING` the only way to `HEALTHY` is
through `STALE` and new weights.

    STARTING -> STALE -> HEALTHY -> SUSPECT -> DEAD -> STARTING

An engine can die in every state. Weights make it `HEALTHY`, and only in that state does it get prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class State(Enum):
    """Where an engine is."""

    STARTING = "starting"
    STALE = "stale"
    """It is there and does not serve the current weights."""
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """It has let a time limit pass."""
    DEAD = "dead"


@dataclass(frozen=True)
class Health:
    """An engine's state, the version that it serves, and how often it was started again."""

    state: State = State.STARTING
    version: int | None = None
    restarts: int = 0

    def booted(self) -> Health:
        """It has started, with whatever weights."""
        return self._from({State.STARTING}, "booted", state=State.STALE, version=None)

    def outdated(self) -> Health:
        """There are new weights, and it has not got them yet."""
        return self._from({State.HEALTHY, State.STALE}, "outdated", state=State.STALE)

    def synced(self, version: int) -> Health:
        """It has taken the weights of a version, and they were checked."""
        return self._from({State.STALE}, "synced", state=State.HEALTHY, version=version)

    def late(self) -> Health:
        """It has let a time limit pass."""
        return self._from({State.HEALTHY, State.STALE, State.STARTING}, "late", state=State.SUSPECT)

    def died(self) -> Health:
        """Its process is gone, or was ended."""
        return replace(self, state=State.DEAD, version=None)

    def restarted(self) -> Health:
        """It is being started again."""
        return self._from({State.DEAD}, "restarted", state=State.STARTING, restarts=self.restarts + 1)

    def _from(self, states: set[State], what: str, **changes: object) -> Health:
        if self.state not in states:
            raise ValueError(f"an engine that is {self.state.value} cannot be {what}")
        return replace(self, **changes)  # type: ignore[arg-type]
