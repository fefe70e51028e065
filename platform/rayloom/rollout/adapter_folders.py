"""Adapters as the folders that vLLM reads: a new one for each version, in memory where the system offers that."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayloom.errors import RequestError

_MEMORY = Path("/dev/shm")
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def adapter_rank_limit(rank: int) -> int:
    """The least limit of ranks that vLLM offers for adapters of this rank.

    Raises:
        RequestError: there is none.
    """
    for limit in _RANKS:
        if rank <= limit:
            return limit
    raise RequestError(f"method.rank: {rank}: the engines serve adapters up to rank {_RANKS[-1]}")


class AdapterFolders:
    """The folders of one engine; gone after `close`."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="rayloom-adapters-", dir=_MEMORY if _MEMORY.is_dir() else None))

    def write(self, name: str, tensors: Mapping[str, Any], config: Mapping[str, Any] | None) -> Path:
        """A new folder of this name, as PEFT would save it."""
        from safetensors.torch import save_file

        folder = self._root / name
        folder.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / _TENSORS)
        (folder / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
        return folder

    def close(self) -> None:
        """Remove all."""
        shutil.rmtree(self._root, ignore_errors=True)


def stored_tensors(folder: str) -> dict[str, Any]:
    """What a folder holds."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / _TENSORS)
