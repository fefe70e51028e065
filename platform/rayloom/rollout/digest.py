"""What tells one set of tensors from another: over names, types, shapes and every byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import xxhash


class Digest:
    """Tensors are added in the order of their names; `count` says how many there were."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()  # nobody forges weights here, and a sync waits for it
        self.count = 0

    def add(self, name: str, tensor: Any) -> None:
        """Args:
        tensor: on CPU, of any type and shape.
        """
        import torch

        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        self._hash.update(data)
        self.count += 1

    def of_those_read(self, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Hand tensors on, and add those that are asked for."""
        for name in sorted(tensors):
            self.add(name, tensors[name])
            yield name, tensors[name]

    def __str__(self) -> str:
        return self._hash.hexdigest()


def digest_of(tensors: Mapping[str, Any]) -> str:
    """The digest of `{name: tensor}`, tensors on CPU; whatever their order."""
    digest = Digest()
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    return str(digest)
