"""The product of one adapter's factors, for engines that hold one.

vLLM 0.32 on CPU copies both factors of the adapter for every token of a batch, in float32: with some thousand tokens
that is gigabytes a layer, and most of an answer's time. Where there is room for one adapter only, all tokens have the
same factors, and two plain products do. At a few tokens a product's start is most of its time; so layers that are
computed together have their factors in one pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

Factors = tuple[torch.Tensor, ...]


def add_products(y: torch.Tensor, x: torch.Tensor, lora_a: Factors, lora_b: Factors) -> None:
    """Add x A B to y, for layers that are computed together each to its own columns. Sums are in float32, and rounded
    between the factors to the type of y, as vLLM rounds them there.

    Args:
        y: (tokens, sum of widths, or more: an output layer's are rounded up).
        x: (tokens, in).
        lora_a: (1, 1, rank, in) each.
        lora_b: (1, 1, width, rank) each.
    """
    a, b = _joined(lora_a, lora_b)
    y[:, : len(b)].addmm_(x @ a.to(x.dtype).T, b.to(y.dtype).T)


_JOINED: Any = WeakIdKeyDictionary()
"""Of layers that are computed together: their first A -> the pair that all their factors lie in."""


def _joined(lora_a: Factors, lora_b: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """One A (ranks, in), one below the other, and one B (widths, ranks), one in each block of its diagonal. What is
    written into the layers' own factors from now on stands there."""
    if len(lora_a) == 1:
        return lora_a[0][0, 0], lora_b[0][0, 0]
    if lora_a[0] not in _JOINED:
        with torch.inference_mode(mode=False):  # vLLM writes the next adapter outside of it, as it may not into others
            _JOINED[lora_a[0]] = _join(lora_a, lora_b)
    joined: tuple[torch.Tensor, torch.Tensor] = _JOINED[lora_a[0]]
    return joined


def _join(lora_a: Factors, lora_b: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.cat([one[0, 0] for one in lora_a])
    b = torch.block_diag(*(one[0, 0] for one in lora_b))
    row = column = 0
    for of_a, of_b in zip(lora_a, lora_b, strict=True):
        width, rank = of_b.shape[-2:]
        of_a.data = a[column : column + rank].expand(1, 1, -1, -1)
        of_b.data = b[row : row + width, column : column + rank].expand(1, 1, -1, -1)
        row, column = row + width, column + rank
    return a, b
