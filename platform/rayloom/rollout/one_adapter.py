"""vLLM's LoRA on CPU, for engines that hold one adapter.

vLLM 0.32 copies both factors of the adapter for every token of a batch, in float32: with some thousand tokens that is
gigabytes a layer, and most of an answer's time. Where there is room for one adapter only, all tokens have the same
factors, and two plain products do. At a few tokens a product's start is most of its time; so layers that are computed
together have their factors in one pair, and an output layer without an adapter has no products at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

Factors = tuple[torch.Tensor, ...]


def use_one_adapter() -> None:
    """Put products in the place of vLLM's copies, in this process. Where an engine has room for several adapters,
    vLLM's own functions still run."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    for name, ours in (("add_lora_linear", _linear_or_theirs), ("add_lora_logits", _logits_or_theirs)):
        theirs = getattr(PunicaWrapperCPU, name)
        if not getattr(theirs, "is_ours", False):
            setattr(PunicaWrapperCPU, name, ours(theirs))


def _linear_or_theirs(theirs: Callable[..., None]) -> Callable[..., None]:
    def add_lora_linear(
        wrapper: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Factors,
        lora_b_stacked: Factors,
        scale: float,
        output_slices: tuple[int, ...],
        **options: Any,
    ) -> None:
        if len(lora_a_stacked[0]) > 1 or scale != 1 or options or not wrapper.is_prefill:
            theirs(wrapper, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **options)
        elif not wrapper.no_lora:  # the batch is of the base model itself
            add_products(y, x, lora_a_stacked, lora_b_stacked)

    add_lora_linear.is_ours = True  # type: ignore[attr-defined]
    return add_lora_linear


def _logits_or_theirs(theirs: Callable[..., None]) -> Callable[..., None]:
    def add_lora_logits(
        wrapper: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **options: Any,
    ) -> None:
        if len(lora_a_stacked) > 1 or scale != 1 or options:
            theirs(wrapper, y, x, lora_a_stacked, lora_b_stacked, scale, **options)
        elif not wrapper.no_lora and lora_a_stacked.any():
            add_products(y, x, (lora_a_stacked,), (lora_b_stacked,))

    add_lora_logits.is_ours = True  # type: ignore[attr-defined]
    return add_lora_logits


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
