"""What tells one set of tensors from another: over names, types, shapes and every byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

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


class Compared(NamedTuple):
    """A tensor that was sent, and what stands where it should be."""

    name: str
    sent: Any
    there: Any
    """None: nothing."""
    factor: float
    """That the tensor was multiplied with, after it was cast to the type of `there`."""


def equal_tensors(compared: Sequence[Compared]) -> dict[str, Any]:
    """`{name: tensor}` of those that are there, equal in every element."""
    equal: dict[str, Any] = {}
    for _, group in groupby(sorted(compared, key=lambda one: one.factor), lambda one: one.factor):
        ones = list(group)
        if not _are_equal(ones):  # all at once: a sync waits for it
            ones = [one for one in ones if _are_equal([one])]
        equal |= {one.name: one.sent for one in ones}
    return equal


def _are_equal(ones: Sequence[Compared]) -> bool:
    """Whether tensors with one factor are all there."""
    import torch

    if any(one.there is None or one.there.shape != one.sent.shape for one in ones):
        return False
    sent = torch.cat([one.sent.flatten() for one in ones])
    there = torch.cat([one.there.flatten() for one in ones])
    return torch.equal(sent.to(there.dtype) * ones[0].factor, there)
