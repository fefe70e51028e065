"""A Ray of a job's own: `python -m rayloom.train.own_ray FOLDER` starts it, says where it is, and ends it when its
input ends, be it because the job was killed.

It is a process beside the job's, so that it starts while the job is checked: both take seconds, and a machine has more
than one core. A job that is refused does not wait for it.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

import rayloom
from rayloom.errors import JobError

_SAYS = "the local Ray is at "
_START_SECONDS = 180.0
_END_SECONDS = 60.0
_KILL_SECONDS = 10.0


class OwnRay:
    """A context manager: begins to start a local Ray, and ends it. It lives in a private temporary folder; nothing of
    it outlives the `with` block."""

    def __enter__(self) -> OwnRay:
        # Socket paths are short.
        self._folder = tempfile.mkdtemp(prefix="rl-", dir="/tmp" if Path("/tmp").is_dir() else None)
        self._log = Path(self._folder, "start.log")
        here = str(Path(rayloom.__file__).parents[1])
        search = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self._folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": search},
                start_new_session=True,  # Ctrl-C is for the job, which ends this Ray when it has saved
            )
        self._address: str | None = None
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            if self._address is not None:
                self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        if self._process.poll() is None:  # or nobody has used it, and nobody waits for its orderly end
            _kill_session(self._process.pid)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def address(self) -> str:
        """Where it listens, when it does.

        Raises:
            JobError: it did not start; says what it said.
        """
        if self._address is None:
            assert self._process.stdout is not None
            timer = threading.Timer(_START_SECONDS, self._process.kill)
            timer.start()
            try:
                lines = (line.decode().strip() for line in self._process.stdout)
                said = next((line for line in lines if line.startswith(_SAYS)), None)
            finally:
                timer.cancel()
            if said is None:
                last = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise JobError(f"the local Ray has not started, or not within {_START_SECONDS:g} s: {last[0]}")
            self._address = said.removeprefix(_SAYS)
        return self._address


def _kill_session(leader: int) -> None:
    """SIGKILL to every process of a session, and to those that they have started meanwhile: one that is left would
    write into the folder once more."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (members := [one for one in psutil.process_iter() if _is_of(one, leader)]) and time.monotonic() < deadline:
        for process in members:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def _is_of(process: Any, leader: int) -> bool:
    try:
        return os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def main() -> None:
    """Be the process that a local Ray belongs to."""
    import ray

    folder = sys.argv[1]
    ray.init(
        address="local",
        _temp_dir=folder,
        include_dashboard=False,
        namespace="rayloom",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    print(_SAYS + ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
