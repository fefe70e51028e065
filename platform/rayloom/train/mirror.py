"""The driver's own files of a run whose directory is at an address: written here, and copied there as they change.

Checkpoints and the model are none of them: who makes those writes them to the address.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rayloom.errors import JobError
from rayloom.remote import Remote

FILES = ("job.yaml", "data.json", "metrics.jsonl", "manifest.jsonl", "result.json", "mlflow_run", "wandb_run")
"""What an earlier part of a run has left that a later one reads or writes on."""
_LAST = "result.json"
"""Says how a run has ended: it must not be there before the rest is."""
_SECONDS = 2.0  # between two looks at what has changed
_SHARE = 20  # a copy that takes long is made seldom: it takes at most one part in so many of the time


class Mirror:
    """A temporary folder in place of a run directory, which is gone with this object."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.folder = Path(tempfile.mkdtemp(prefix="rayloom-run-"))
        self._cleaner = weakref.finalize(self, shutil.rmtree, str(self.folder), ignore_errors=True)
        self._copied: dict[str, tuple[int, int]] = {}  # of each file that is at the address: size and time
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self) -> bool:
        """Read what an earlier part of the run has left; whether anything is at the address.

        Raises:
            OSError: it cannot be read.
        """
        found = self.remote.names()
        for name in found.intersection(FILES):
            content = self.remote.read(name)
            if content is not None:
                (self.folder / name).write_bytes(content)
                self._copied[name] = _state(self.folder / name)
        return bool(found)

    def forget(self) -> None:
        """Begin with an empty folder."""
        for name in self._copied:
            (self.folder / name).unlink(missing_ok=True)
        self._copied.clear()

    def start(self, say: Callable[[str], None]) -> None:
        """Copy what is here now, and from now on what changes, in a thread.

        Args:
            say: for a line where a copy fails, which is tried again.

        Raises:
            OSError: the first copy failed.
        """
        self._copy()
        self._thread = threading.Thread(target=self._follow, args=(say,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Copy nothing more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Copy all that is left, `result.json` last.

        Raises:
            JobError: it cannot be written; the folder is kept and named.
        """
        self.stop()
        try:
            self._copy(also_folders=True)
        except OSError as error:
            self._cleaner.detach()
            raise JobError(f"{error}. What could not be written there is kept in {self.folder}") from error

    def _follow(self, say: Callable[[str], None]) -> None:
        pause, failed = _SECONDS, False
        while not self._ended.wait(pause):
            started = time.monotonic()
            try:
                self._copy()
                failed = False
            except OSError as error:
                if not failed:
                    say(f"{error}; is tried again")
                failed = True
            pause = max(_SECONDS, _SHARE * (time.monotonic() - started))

    def _copy(self, *, also_folders: bool = False) -> None:
        """Put every file there that is not there as it is here."""
        files = self.folder.rglob("*") if also_folders else self.folder.glob("*")
        names = (file.relative_to(self.folder).as_posix() for file in files if file.is_file())
        kept = (name for name in names if not name.startswith(".") and not name.endswith(".partial"))
        for name in sorted(kept, key=lambda name: (name == _LAST, name)):
            with suppress(FileNotFoundError):  # a file that was being replaced
                state = _state(self.folder / name)
                if self._copied.get(name) == state:
                    continue
                content = (self.folder / name).read_bytes()
                self.remote.write(name, content)
                self._copied[name] = state


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
