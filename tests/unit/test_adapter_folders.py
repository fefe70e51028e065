"""The folders that engines read adapters from: in memory where there is room, and gone with the engine."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rayloom.rollout import adapter_folders
from rayloom.rollout.adapter_folders import AdapterFolders, sweep

FILE = np.arange(64, dtype=np.uint8)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node of its own: other folders in the place of the system's."""
    made = tmp_path / "memory"
    made.mkdir()
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(adapter_folders, "_MEMORY", made)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "disk"))
    return made


def test_a_folder_is_as_peft_saves_it_and_gone_afterwards(memory: Path, tmp_path: Path) -> None:
    folders = AdapterFolders()
    folder = folders.write("version-1", FILE, {"r": 4})
    assert folder.is_relative_to(memory)
    assert (folder / "adapter_model.safetensors").read_bytes() == FILE.tobytes()
    assert (folder / "adapter_config.json").read_text() == '{"r": 4}'
    assert not (folders.write("whole", FILE, None) / "adapter_config.json").exists()
    folders.close()
    assert not [*memory.iterdir(), *(tmp_path / "disk").iterdir()]


def test_without_room_in_memory_it_is_on_the_disk(memory: Path, tmp_path: Path) -> None:
    folders = AdapterFolders(spare=2**60)
    assert folders.write("version-1", FILE, {}).is_relative_to(tmp_path / "disk")
    folders.close()


def test_what_a_killed_process_left_is_swept_and_nothing_else(memory: Path, tmp_path: Path) -> None:
    mine = AdapterFolders()
    folder = mine.write("version-1", FILE, {})
    program = (
        "import sys, tempfile, pathlib; import numpy\n"
        "from rayloom.rollout import adapter_folders\n"
        "adapter_folders._MEMORY, tempfile.tempdir = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "folders = adapter_folders.AdapterFolders()\n"
        "print(folders.write('version-1', numpy.zeros(8, numpy.uint8), {}), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(memory), str(tmp_path / "disk")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        sweep()
        assert theirs.is_dir()  # it lives
        other.send_signal(signal.SIGKILL)
    assert theirs.is_dir()
    sweep()
    assert not theirs.parent.exists()
    assert folder.is_dir()
    foreign = memory / "rayloom-engine-foreign"
    foreign.mkdir()
    sweep()
    assert foreign.is_dir()  # it has no lock, so it is none of ours
    mine.close()
