"""The wire between the driver and the workers: metrics come in, the wish to stop goes out."""

from __future__ import annotations

from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayloom.errors import JobError

ANSWER_SECONDS = 120.0


class Monitor:
    """A mailbox that lives as long as the driver. Rank 0 posts and asks; the driver collects and tells."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = False

    def post(self, event: dict[str, Any]) -> None:
        """Rank 0: something for the driver, `{"kind": "metrics" | "phase" | "say" | ..., ...}`."""
        self._events.append(event)

    def collect(self) -> list[dict[str, Any]]:
        """Driver: everything posted since the last call."""
        events, self._events = self._events, []
        return events

    def request_stop(self) -> None:
        """Driver: ask the workers to save a checkpoint after the step they are in, and end."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Rank 0, once a step."""
        return self._stop


def start_monitor() -> Any:
    """Start the actor; it ends with the driver. One call at a time, so that no event falls between two.

    On the driver's own node: it must not die with another.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Monitor).options(num_cpus=0, scheduling_strategy=here).remote()


def answer(call: Any, who: str) -> Any:
    """The answer to a call of the monitor.

    Raises:
        JobError: there was none within `ANSWER_SECONDS`; says who waited.
    """
    try:
        return ray.get(call, timeout=ANSWER_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise JobError(f"{who} waited {ANSWER_SECONDS:g} s for the driver's monitor, which does not answer") from None
