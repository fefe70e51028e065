"""A local Ray of a job's own: it works, and leaves nothing, whatever became of the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SESSION = """
import json, sys
import psutil
from rayloom.errors import RequestError
from rayloom.train.ray_session import prepare_environment, ray_session

prepare_environment()
seen = {"processes": [], "folder": None, "answer": None}

def look():
    children = psutil.Process().children(recursive=True)
    seen["processes"] = [(child.pid, child.create_time()) for child in children]

try:
    with ray_session(verbose=False) as own_cluster:
        assert own_cluster
        import ray
        seen["folder"] = ray._private.worker._global_node.get_temp_dir_path()
        seen["answer"] = ray.get(ray.remote(lambda: 41 + 1).remote(), timeout=60)
        look()
        if sys.argv[1] == "refused":
            raise RequestError("no such key")
except RequestError as error:
    seen["answer"] = str(error)
print(json.dumps(seen))
"""


@pytest.mark.parametrize(("what", "answer"), [("used", 42), ("refused", "no such key")])
def test_a_local_ray_leaves_nothing(what: str, answer: object) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", SESSION, what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["answer"] == answer
    assert seen["processes"]
    assert not Path(seen["folder"]).exists()
    until = time.monotonic() + 20
    while left := [pid for pid, started in seen["processes"] if _is_same(pid, started)]:
        assert time.monotonic() < until, f"still there: {left}"
        time.sleep(0.2)


EARLY = """
import sys, time
from rayloom.train.ray_session import own_ray, prepare_environment

prepare_environment()
with own_ray() as own:
    print(own._folder, flush=True)
    if sys.argv[1] == "killed":
        own.address()
        print("started", flush=True)
        time.sleep(600)
    time.sleep(float(sys.argv[1]))
    sys.exit("no such key")
"""


@pytest.mark.parametrize("when", ["3", "killed"])
def test_a_job_that_never_used_it_leaves_nothing(when: str) -> None:
    """Refused while Ray starts; or killed, which leaves nobody to end it but itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", EARLY, when]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = process.stdout.readline().strip()
        if when == "killed":
            assert process.stdout.readline() == "started\n"
            process.kill()
        assert process.wait(timeout=60) != 0
    until = time.monotonic() + 60
    while left := [one.pid for one in psutil.process_iter() if folder in _command_of(one)]:
        assert time.monotonic() < until, f"still there: {left}"
        time.sleep(0.2)
    while Path(folder).exists():
        assert time.monotonic() < until
        time.sleep(0.2)


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _is_same(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
