"""After which errors a job goes on by itself."""

from __future__ import annotations

import pytest
import ray.exceptions
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from rayloom.train.faults import fault_of

DIED = WorkerHealthCheckFailedError("the worker is gone", ray.exceptions.ActorDiedError())


def raised(error: Exception) -> Exception:
    return UserExceptionWithTraceback(error, "trace")


@pytest.mark.parametrize(
    ("error", "who"),
    [
        (WorkerGroupError("x", {1: DIED}), "worker 1 died"),
        (WorkerGroupError("x", {0: raised(RuntimeError("Connection closed by peer")), 1: DIED}), "worker 1 died"),
        (WorkerGroupError("x", {0: raised(RuntimeError("[gloo] Connection closed by peer [::1]"))}), "worker 0 lost"),
        (
            WorkerGroupError("x", {0: raised(ray.exceptions.ActorDiedError())}),
            "worker 0 asked for something of a process that died",
        ),
        (ray.exceptions.ActorDiedError(), "Ray Train's controller died"),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), "Ray Train's controller could not start the workers"),
    ],
)
def test_faults(error, who):
    assert fault_of(error).startswith(who)


@pytest.mark.parametrize(
    "error",
    [
        WorkerGroupError("x", {0: raised(ValueError("shapes do not match"))}),
        WorkerGroupError("x", {0: raised(RuntimeError("CUDA out of memory"))}),
        ControllerError(OSError(28, "No space left on device")),
        KeyError("loss"),
    ],
)
def test_what_would_happen_again(error):
    assert fault_of(error) is None
