"""vLLM's LoRA on CPU, for engines that hold one adapter.

vLLM 0.32 copies both factors of the adapter for every token of a batch, in float32: with some thousand tokens that is
gigabytes a layer, and most of an answer's time. Where there is room for one adapter only, all tokens have the same
factors, and two plain products do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def use_one_adapter() -> None:
    """Put products in the place of vLLM's copies, in this process. Where an engine has room for several adapters,
    vLLM's own function still runs."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    theirs = PunicaWrapperCPU.add_lora_linear
    if not getattr(theirs, "is_ours", False):
        PunicaWrapperCPU.add_lora_linear = _or_theirs(theirs)  # type: ignore[method-assign]


def _or_theirs(theirs: Callable[..., None]) -> Callable[..., None]:
    def add_lora_linear(
        wrapper: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **options: Any,
    ) -> None:
        if len(lora_a_stacked[0]) > 1 or scale != 1 or options or not wrapper.is_prefill:
            theirs(wrapper, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **options)
        elif not wrapper.no_lora:  # the batch is of the base model itself
            add_products(y, x, lora_a_stacked, lora_b_stacked, output_slices)

    add_lora_linear.is_ours = True  # type: ignore[attr-defined]
    return add_lora_linear


def add_products(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: tuple[torch.Tensor, ...],
    lora_b: tuple[torch.Tensor, ...],
    widths: tuple[int, ...],
) -> None:
    """Add x A B to y, for layers that are computed together each to its own columns. Sums are in float32, and rounded
    between the factors to the type of y, as vLLM rounds them there.

    Args:
        y: (tokens, sum of `widths`).
        x: (tokens, in).
        lora_a: (1, 1, rank, in) each.
        lora_b: (1, 1, width, rank) each.
    """
    start = 0
    for a, b, width in zip(lora_a, lora_b, widths, strict=True):
        y[:, start : start + width].addmm_(x @ a[0, 0].to(x.dtype).T, b[0, 0].to(y.dtype).T)
        start += width
