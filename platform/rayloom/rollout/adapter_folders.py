"""Adapters as the folders that vLLM reads: a new one for each version, in memory where the system offers that."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rayloom.errors import RequestError

_MEMORY = Path("/dev/shm")
_PREFIX = "rayloom-engine-"
_CONFIG, _TENSORS, _LOCK = "adapter_config.json", "adapter_model.safetensors", "lock"
_SPARE = 2**25  # Ray's object store is in the same memory
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
    """The folders of one engine, written by its own process on its own node; gone after `close`. What a killed process
    leaves behind, the next `sweep` on that node removes: it can be told by a lock that nobody holds any more.

    Args:
        spare: bytes that must stay free in memory; where they would not, a folder comes onto the disk.
    """

    def __init__(self, *, spare: int = _SPARE) -> None:
        sweep()
        self._spare = spare
        self._owned = [_owned_folder(place) for place in _places()]

    def write(self, name: str, file: Any, config: Mapping[str, Any] | None) -> Path:
        """A new folder of this name, as PEFT would save it.

        Args:
            file: the tensors (`pack`).
            config: the adapter's; None: the tensors are no adapter's.
        """
        *in_memory, on_disk = (root for root, _ in self._owned)
        need = len(file) + self._spare
        folder = next((root for root in in_memory if shutil.disk_usage(root).free >= need), on_disk) / name
        folder.mkdir()
        (folder / _TENSORS).write_bytes(file)
        if config is not None:
            (folder / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
        return folder

    def close(self) -> None:
        """Remove all."""
        for root, lock in self._owned:
            shutil.rmtree(root, ignore_errors=True)
            lock.close()
        self._owned = []


def sweep() -> None:
    """Remove the folders on this node whose engine is gone."""
    for place in _places():
        for root in place.glob(f"{_PREFIX}*"):
            try:
                with (root / _LOCK).open("r+b") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(root, ignore_errors=True)
            except OSError:  # its engine is there, it is another user's, or another process has just removed it
                continue


def _places() -> list[Path]:
    """Where folders may be: in memory, where the system offers that, and on the disk."""
    memory = [_MEMORY] if os.access(_MEMORY, os.W_OK) else []
    return [*memory, Path(tempfile.gettempdir())]


def _owned_folder(place: Path) -> tuple[Path, IO[bytes]]:
    """A folder, and the lock on it. It gets the name that `sweep` looks for only once it is locked."""
    made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=place))
    lock = (made / _LOCK).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return made.rename(made.with_name(made.name.removeprefix("."))), lock


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
