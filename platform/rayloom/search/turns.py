"""Whose turn it is to train, where a population has more trials than the cluster holds: those that are behind come
first."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any


class Turns:
    """So many trials may train at a time. An actor, which ends with the search.

    Args:
        places: trials at a time.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._holders: set[str] = set()
        self._waiting: dict[str, int] = {}

    def ask(self, trial: str, rung: int) -> bool:
        """Whether a trial may train now; if not, it waits, and asks again.

        Args:
            rung: how far it is.
        """
        if trial in self._holders:
            return True
        self._waiting[trial] = rung
        free = self._places - len(self._holders)
        first = sorted(self._waiting, key=lambda name: (self._waiting[name], name))[:free]
        if trial in first:
            del self._waiting[trial]
            self._holders.add(trial)
        return trial in self._holders

    def give(self, trial: str) -> None:
        """A trial does not train any more."""
        self._holders.discard(trial)
        self._waiting.pop(trial, None)

    def is_wanted(self, rung: int) -> bool:
        """Whether a trial waits that is not as far."""
        return any(behind < rung for behind in self._waiting.values())


def start_turns(search: Path, places: int) -> Any:
    """Start the actor of a search, told by its folder."""
    import ray

    return ray.remote(Turns).options(num_cpus=0, name=_name(search)).remote(places)


def give_for(search: Path, trial: str) -> None:
    """Give the turn of a trial whose process has died."""
    import ray

    with suppress(ValueError):  # there is none: every trial trains at the same time
        actor: Any = ray.get_actor(_name(search))
        actor.give.remote(trial)


def _name(search: Path) -> str:
    return f"rayloom-turns-{hashlib.sha256(str(search).encode()).hexdigest()[:16]}"
