"""What a model's or an adapter's files are, in a short text that changes when they do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rayloom.models.config import ModelConfig
from rayloom.models.source import model_folder, raw_config

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16
"""Of each file so many places are read, evenly spread: training changes weights everywhere."""


def model_fingerprint(model: ModelConfig, *, times: bool = True) -> str:
    """Of a folder as `folder_fingerprint`, of a hub model its commit.

    Raises:
        RequestError: there is no such model.
    """
    source = model_folder(model.path)
    if Path(source).is_dir():
        return folder_fingerprint(Path(source), times=times)
    config = raw_config(model)
    return f"{source} {config.get('_commit_hash') or hashlib.sha256(json.dumps(config).encode()).hexdigest()}"


def folder_fingerprint(folder: Path, *, times: bool = True) -> str:
    """Of the files' names, sizes, times of change and samples of their content; where the folder is counts nothing.

    Args:
        times: whether the times count; a copy on another machine has others.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = file.stat()
        told = [str(file.relative_to(folder)), status.st_size, *([status.st_mtime_ns] if times else [])]
        digest.update(json.dumps(told).encode())
        with file.open("rb") as content:
            last = max(0, status.st_size - _SAMPLE_BYTES)
            for number in range(_SAMPLES if last else 1):
                content.seek(last * number // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()
