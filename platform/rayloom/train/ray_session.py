"""Which Ray a job runs on: the cluster that the environment names, or a private local one."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rayloom

_ENVIRONMENT = {
    # Ray Train reads these in the driver and hands them on to its controller and workers.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_COLLECTIVE_WARN_INTERVAL_S": "600",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
# Set where Ray Jobs started this driver; says which runtime environment the job already has.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def prepare_environment() -> None:
    """Say to Ray what it reads from the environment, once, when it is imported. Call this before anything imports it.

    A Ray of our own authenticates with a fresh token that no file holds, unless the user has said how.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # DeepSpeed compiles with the `ninja` that stands beside this Python, whether or not its environment is activated.
    own_folder = str(Path(sys.executable).parent)
    if own_folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([own_folder, os.environ.get("PATH", os.defpath)])
    if not os.environ.get("RAY_ADDRESS") and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


class StartingRay:
    """A connection to Ray that is being made, in a thread of its own.

    The thread lives as long as the connection: the system ends the processes of a local Ray with the thread that has
    started them.
    """

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._own_folder: str | None = None
        self._error: BaseException | None = None
        self._connected, self._over = threading.Event(), threading.Event()
        if not os.environ.get("RAY_ADDRESS"):
            parent = "/tmp" if Path("/tmp").is_dir() else None  # socket paths are short
            self._own_folder = tempfile.mkdtemp(prefix="rl-", dir=parent)
        self._thread = threading.Thread(target=self._run, name="ray", daemon=True)
        self._thread.start()

    def wait(self) -> bool:
        """Whether the cluster is our own local one, once it is connected.

        Raises:
            Exception: what Ray raises where it cannot connect.
        """
        self._connected.wait()
        if self._error is not None:
            raise self._error
        return self._own_folder is not None

    def end(self) -> None:
        """Disconnect; a Ray of our own ends, and leaves nothing."""
        self._over.set()
        self._thread.join()
        if self._own_folder is not None:
            shutil.rmtree(self._own_folder, ignore_errors=True)

    def _run(self) -> None:
        import ray

        try:
            where = {"address": "local", "_temp_dir": self._own_folder, "include_dashboard": False}
            ray.init(
                **(where if self._own_folder else {"address": os.environ["RAY_ADDRESS"]}),
                namespace="rayloom",
                log_to_driver=self._verbose,
                logging_level=logging.INFO if self._verbose else logging.ERROR,
                runtime_env=_runtime_env(),
                configure_logging=True,
            )
        except BaseException as error:  # told to whoever waits
            self._error = error
        self._connected.set()
        self._over.wait()
        ray.shutdown()


@contextmanager
def ray_session(*, verbose: bool) -> Iterator[StartingRay]:
    """Connect to the cluster that `RAY_ADDRESS` names, else start a local Ray of our own and end it afterwards.

    The local one lives in a private temporary folder, with a token of its own: nothing of it outlives the job, and
    no other Ray on the machine is touched.

    Yields:
        The connection that is being made; `wait` for it before Ray is used.
    """
    starting = StartingRay(verbose)
    try:
        yield starting
    finally:
        starting.end()


def _runtime_env() -> dict[str, Any]:
    """Give the workers this very package, unless the job that we run in has brought it."""
    environment: dict[str, Any] = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
    brought = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env", {})
    if "py_modules" not in brought:
        environment["py_modules"] = [str(Path(rayloom.__file__).parent)]
    if "env_vars" in brought:  # Ray refuses to merge a variable that both set
        environment["env_vars"] = {
            name: value for name, value in environment["env_vars"].items() if name not in brought["env_vars"]
        }
    return environment
