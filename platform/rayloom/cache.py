"""What is made once on a machine and found again: where it is kept, and who makes it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayloom.errors import JobError

_POLL_SECONDS = 0.1


def cache_dir() -> Path:
    """Rayloom's folder for such things: `$XDG_CACHE_HOME/rayloom`, by default `~/.cache/rayloom`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "rayloom"


@contextmanager
def only_one(lock: Path, what: str, wait_seconds: float = 1800.0) -> Iterator[None]:
    """Hold `lock`, a file made as needed; one process of a machine at a time does.

    The system takes the lock from a process that ends, however it ends, so none is ever left behind.

    Args:
        what: What is made under the lock, for the error.
        wait_seconds: How long to wait for whoever holds it.

    Raises:
        JobError: another process held it all the time.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        until = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    message = f"waited {wait_seconds:g} s for another process that makes {what} (it holds {lock})"
                    raise JobError(message) from None
                time.sleep(_POLL_SECONDS)
        yield
