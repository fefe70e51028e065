"""The keeper finds and ends every process of a head, and only those; tried on shells in place of Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rayloom.jobs import keeper

# A child, one that left the session, and one that left the tree as well.
TREE = "setsid sleep 300 & (setsid sleep 300 &) ; sleep 300 & echo up; wait"


@pytest.fixture
def shell() -> str:
    return TREE


@pytest.fixture
def head(shell: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, keeper.MARK: "test-mark"}
    process = subprocess.Popen(["sh", "-c", shell], env=environment, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    time.sleep(0.3)  # for `setsid` to have run
    yield process
    keeper.end_processes(process.pid, "test-mark")
    process.wait()
    process.stdout.close()


def _alive(processes: set[psutil.Process]) -> list[int]:
    return [p.pid for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_finds_what_left_the_session_and_the_tree(head: subprocess.Popen[bytes]) -> None:
    found = keeper.head_processes(head.pid, "test-mark", set())
    assert len(found) == 4
    assert os.getpid() not in {process.pid for process in found}
    assert keeper.head_processes(0x7FFFFFF0, "another mark", set()) == set()


@pytest.mark.parametrize("shell", [TREE, "trap '' TERM; " + TREE], ids=["obedient", "deaf to SIGTERM"])
def test_ends_them_all(head: subprocess.Popen[bytes]) -> None:
    found = keeper.head_processes(head.pid, "test-mark", set())
    assert keeper.end_processes(head.pid, "test-mark") == []
    assert _alive(found) == []


@pytest.mark.parametrize("end", ["told", "input closed", "starter killed"])
def test_script_ends_head_and_folder(head: subprocess.Popen[bytes], tmp_path: Path, end: str) -> None:
    found = keeper.head_processes(head.pid, "test-mark", set())
    folder = tmp_path / "head"
    (folder / "logs").mkdir(parents=True)
    # The starter is a process of its own, so that it can be killed; it hands its input on to the keeper.
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys\n"
            "arguments = [sys.executable, '-P', sys.argv[1], str(os.getpid()), *sys.argv[2:]]\n"
            "subprocess.run(arguments, start_new_session=True)",
            *(keeper.__file__, str(head.pid), "test-mark", str(folder)),
        ],
        stdin=subprocess.PIPE,
    )
    assert starter.stdin is not None
    time.sleep(1.0)
    assert len(_alive(found)) == 4
    if end == "told":
        starter.stdin.write(b"end\n")
        starter.stdin.flush()
    elif end == "input closed":
        starter.stdin.close()
    else:
        starter.kill()
    deadline = time.monotonic() + 15
    while (_alive(found) or folder.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _alive(found) == []
    assert not folder.exists()
    starter.wait(10)
