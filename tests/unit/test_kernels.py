"""DeepSpeed's kernels: what a killed process leaves behind stops nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from rayloom.errors import JobError
from rayloom.train.kernels import kernel_folder, load_kernels

SOURCE = 'extern "C" int answer() { return 42; }\n'
COMPILE = """
import ctypes, sys
from pathlib import Path
from torch.utils.cpp_extension import load
from rayloom.train.kernels import load_kernels
folder, source = map(Path, sys.argv[1:])
load_kernels(lambda: load("answer_kernel", [str(source)], is_python_module=False), folder)
print(ctypes.CDLL(str(folder / "answer_kernel" / "answer_kernel.so")).answer())
"""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")


def compile_apart(folder: Path, source: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-c", COMPILE, str(folder), str(source)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_a_killed_compilation_is_made_anew(tmp_path):
    folder, source = tmp_path / "kernels", tmp_path / "answer.cpp"
    source.write_text(SOURCE)
    first = compile_apart(folder, source)
    lock = folder / "answer_kernel" / "lock"
    until = time.monotonic() + 60
    while not lock.exists():
        assert first.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert lock.exists(), "the trap is gone: torch cleans up after a killed process"
    second = compile_apart(folder, source)
    printed, _ = second.communicate(timeout=120)
    assert (second.returncode, printed.strip()) == (0, "42")
    assert not lock.exists()


def test_a_lock_left_behind_with_a_whole_kernel(tmp_path):
    (tmp_path / "kernel").mkdir()
    assert FileBaton(str(tmp_path / "kernel" / "lock")).try_acquire()
    load_kernels(lambda: None, tmp_path)
    assert not (tmp_path / "kernel").exists()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


def test_one_at_a_time_and_not_without_end(tmp_path):
    def meanwhile() -> None:
        with pytest.raises(JobError, match=r"waited 0\.3 s for another process that makes DeepSpeed's kernels"):
            load_kernels(lambda: None, tmp_path, wait_seconds=0.3)

    load_kernels(meanwhile, tmp_path)


def test_each_environment_and_cpu_has_its_own_folder(monkeypatch):
    own = kernel_folder()
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert kernel_folder() != own
    monkeypatch.undo()
    monkeypatch.setattr("rayloom.train.kernels._cpu_flags", lambda: "flags: fewer")
    assert kernel_folder() != own
