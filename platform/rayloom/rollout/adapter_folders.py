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

    def write(self, name: str, file: Any, config: Mapping[str, Any] | None) -> Path:
        """A new folder of this name, as PEFT would save it.

        Args:
            file: the tensors (`pack`).
        """
        folder = self._root / name
        folder.mkdir()
        (folder / _TENSORS).write_bytes(file)
        (folder / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
        return folder

    def close(self) -> None:
        """Remove all."""
        shutil.rmtree(self._root, ignore_errors=True)


def pack(tensors: Mapping[str, Any]) -> Any:
    """An adapter's file, (bytes,) uint8: one array, which Ray hands from process to process without a copy.

    Written here byte for byte (https://huggingface.co/docs/safetensors, format), in a quarter of the time that the
    library's own `save` takes for some hundred small tensors: a sync waits for it.

    Args:
        tensors: `{name: tensor}` on CPU, named as PEFT saves them.
    """
    import numpy as np
    import torch

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8
    begin = 8 + len(text)
    file = np.empty(begin + end, dtype=np.uint8)
    file[:begin] = np.frombuffer(len(text).to_bytes(8, "little") + text, dtype=np.uint8)
    for name, tensor in tensors.items():
        start, end = header[name]["data_offsets"]
        file[begin + start : begin + end] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return file


def stored_tensors(folder: str) -> dict[str, Any]:
    """What a folder holds."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / _TENSORS)
