"""Ends a local Ray head when its starter says so or is gone, whatever way it went: a process of its own.

`local_head.py` runs this file as a script: python keeper.py STARTER SESSION MARK FOLDER. It imports nothing of Rayloom.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

MARK = "RAYLOOM_LOCAL_HEAD"
"""An environment variable that every process of the head inherits; it finds those that left its session and tree."""

_GRACE_SECONDS = 3.0  # Ray's own orderly end waits for the tasks that run, so it must not be waited for
_GIVE_UP_SECONDS = 15.0


def wait_for_end(starter: int) -> None:
    """Return when the starter writes to our standard input, closes it, or is no longer our parent."""
    while os.getppid() == starter:
        if select.select([sys.stdin], [], [], 0.5)[0]:
            return


def end_processes(session: int, mark: str) -> list[int]:
    """SIGTERM to every process of the head, SIGKILL to those that are there after some seconds.

    Args:
        session: process id of the head, which leads a session.
        mark: its value of `MARK`.

    Returns:
        Process ids of those that survived.
    """
    begin = time.monotonic()
    members: set[Any] = set()
    asked: set[Any] = set()
    while members := head_processes(session, mark, members):
        seconds = time.monotonic() - begin
        if seconds > _GIVE_UP_SECONDS:
            break
        for process in members:
            with suppress(psutil.Error):
                if seconds > _GRACE_SECONDS:
                    process.kill()
                elif process not in asked:
                    process.terminate()
        asked |= members
        time.sleep(0.1)
    return sorted(process.pid for process in members)


def head_processes(session: int, mark: str, known: set[Any]) -> set[Any]:
    """The processes of the head that run: its session's, those that carry its mark, `known`, and all their children."""
    running: dict[int, Any] = {}
    children: dict[int, list[int]] = {}
    pending: list[int] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            running[process.pid] = process
            children.setdefault(process.ppid(), []).append(process.pid)
            if process in known or os.getsid(process.pid) == session or process.environ().get(MARK) == mark:
                pending.append(process.pid)
    members: set[int] = set()
    while pending:
        pid = pending.pop()
        if pid in running and pid not in members:
            members.add(pid)
            pending += children.get(pid, [])
    return {running[pid] for pid in members}


def remove(folder: Path) -> None:
    """Delete the folder, though a process that is just ending may still write into it."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


if __name__ == "__main__":
    starter, session, mark, folder = sys.argv[1:]
    wait_for_end(int(starter))
    survivors = end_processes(int(session), mark)
    remove(Path(folder))
    with suppress(OSError):  # the starter may be gone
        print(*survivors, flush=True)
