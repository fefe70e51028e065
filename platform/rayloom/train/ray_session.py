"""Which Ray a job runs on: the cluster that the environment names, or a private local one."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rayloom
from rayloom.train.own_ray import OwnRay

_ENVIRONMENT = {
    # Ray Train reads these in the driver and hands them on to its controller and workers.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_COLLECTIVE_WARN_INTERVAL_S": "600",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # `rayloom.train.execution` looks after nodes that will be taken away.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray Train's controller does so.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
_VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",
    # One heap for all threads: glibc gives each its own, and a worker's training thread then keeps a fifth more memory
    # than with one (tests/bench/NOTES.md).
    "MALLOC_ARENA_MAX": "1",
    # What is larger than this comes from the system and goes back to it. By itself glibc raises the limit to 32 MB, and
    # activations and what stands for a moment then share a heap full of holes: a quarter of a worker's memory.
    "MALLOC_MMAP_THRESHOLD_": str(2**24),
}
# Set where Ray Jobs started this driver; says which runtime environment the job already has.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def prepare_environment() -> None:
    """Say to Ray what it reads from the environment, once, when it is imported. Call this before anything imports it.

    A Ray of our own authenticates with a fresh token that no file holds, unless the user has said how.
    """
    set_variables()
    if not os.environ.get("RAY_ADDRESS") and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def set_variables() -> None:
    """What a driver's environment says to Ray Train and DeepSpeed, whoever has started Ray."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # DeepSpeed compiles with the `ninja` that stands beside this Python, whether or not its environment is activated.
    own_folder = str(Path(sys.executable).parent)
    if own_folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([own_folder, os.environ.get("PATH", os.defpath)])


@contextmanager
def own_ray() -> Iterator[OwnRay | None]:
    """A local Ray that begins to start now, for `ray_session`; None where `RAY_ADDRESS` names a cluster."""
    if os.environ.get("RAY_ADDRESS"):
        yield None
        return
    # Its processes inherit this one's environment and module path. A runtime environment that said the same would make
    # each of them load Ray twice.
    os.environ.update(_VARIABLES)
    with OwnRay() as own:
        yield own


@contextmanager
def ray_session(*, verbose: bool, own: OwnRay | None = None) -> Iterator[bool]:
    """Connect to the cluster that `RAY_ADDRESS` names, else to a local Ray of our own, which ends afterwards.

    The local one lives in a private temporary folder, with a token of its own: nothing of it outlives the job, and
    no other Ray on the machine is touched.

    Args:
        own: the local Ray, if it was told to start before.

    Yields:
        Whether the cluster is our own local one.
    """
    if os.environ.get("RAY_ADDRESS"):
        with _connected(verbose, address=os.environ["RAY_ADDRESS"], runtime_env=_runtime_env()):
            yield False
    elif own is None:
        with own_ray() as started, ray_session(verbose=verbose, own=started):
            yield True
    else:
        with _connected(verbose, address=own.address()):
            yield True


@contextmanager
def _connected(verbose: bool, **options: Any) -> Iterator[None]:
    import ray

    ray.init(
        **options,
        namespace="rayloom",
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.ERROR,
        configure_logging=True,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _runtime_env() -> dict[str, Any]:
    """Give the workers this very package, unless the job that we run in has brought it."""
    environment: dict[str, Any] = {"env_vars": dict(_VARIABLES)}
    brought = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env", {})
    if "py_modules" not in brought:
        environment["py_modules"] = [str(Path(rayloom.__file__).parent)]
    if "env_vars" in brought:  # Ray refuses to merge a variable that both set
        environment["env_vars"] = {
            name: value for name, value in environment["env_vars"].items() if name not in brought["env_vars"]
        }
    return environment
