"""Faults of machines and processes, after which a job goes on from its last checkpoint; and what is no such fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions


def fault_of(error: BaseException) -> str | None:
    """What broke, in a line: a process, a machine or the connection between them. None: it is the job itself that
    fails, and would do so again.

    Args:
        error: what `fit` of a Ray Train trainer has raised.
    """
    parts = list(_parts(error))
    for who, part, is_own in parts:
        if isinstance(part, _BROKEN):
            what = "died" if is_own else "asked for something of a process that died"
            return f"{who} {what}: {_first_line(part)}"
        if type(part).__name__ in _NOT_STARTED:  # a machine went while they were starting
            return f"{who} could not start the workers: {_first_line(part)}"
    for who, part, _ in parts:
        if type(part).__name__ in ("DistBackendError", "DistNetworkError", "TimeoutError") or _is_connection(part):
            return f"{who} lost the connection to the others: {_first_line(part)}"
    return None


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be taken away and have said so."""
    from ray._private import state  # where Ray Train's own watcher looks too; there is no public way

    return set(state.state.get_draining_nodes())


_BROKEN = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
)
_NOT_STARTED = ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError")
_CONNECTION = (
    "application timeout caused pair closure",
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "timed out waiting",
)


def _parts(error: BaseException) -> Iterator[tuple[str, BaseException, bool]]:
    """(who, exception, whether it is who died and not whom it asked) of everything that an error stands for."""
    import ray.train

    if isinstance(error, ray.train.WorkerGroupError):
        for rank, failure in sorted(error.worker_failures.items()):
            yield f"worker {rank}", _inner(failure), hasattr(failure, "health_check_failure")
    elif isinstance(error, ray.train.ControllerError):
        yield "Ray Train's controller", _inner(error.controller_failure), False
    else:
        yield "Ray Train's controller", error, True


def _inner(failure: Any) -> BaseException:
    """What Ray Train has wrapped: the failure of a health check, or what the worker's code raised."""
    for name in ("health_check_failure", "_base_exc"):
        failure = getattr(failure, name, failure)
    cause = getattr(failure, "cause", None)
    return cause if isinstance(cause, BaseException) else failure


def _is_connection(part: BaseException) -> bool:
    text = str(part).lower()
    return isinstance(part, RuntimeError) and any(said in text for said in _CONNECTION)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__
