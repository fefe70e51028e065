"""vLLM's LoRA on CPU, for engines that hold one adapter.

vLLM 0.32 copies both factors of the adapter for every token of a batch, in float32: with some thousand tokens that is
gigabytes a layer, and most of an answer's time. Where there is room for one adapter only, all tokens have the same
factors, and two plain products do. Nothing else changes: vLLM itself reads the one adapter for every token then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def use_one_adapter() -> None:
    """Put products in the place of vLLM's copies, in this process. Where an engine has room for several adapters,
    vLLM's own functions still run."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name, ours in (("bgmv_shrink", _shrink), ("bgmv_expand", _expand), ("bgmv_expand_slice", _expand_slice)):
        theirs = getattr(lora_ops, name)
        if getattr(theirs, "is_ours", False):
            continue
        chosen = _or_theirs(ours, theirs)
        setattr(lora_ops, name, chosen)  # also what the functions for prompts call
        setattr(punica_cpu, name, chosen)


def _or_theirs(ours: Callable[..., None], theirs: Callable[..., None]) -> Callable[..., None]:
    def chosen(inputs: torch.Tensor, weights: torch.Tensor, *more: Any, **options: Any) -> None:
        (ours if weights.shape[0] == 1 else theirs)(inputs, weights, *more, **options)

    chosen.is_ours = True  # type: ignore[attr-defined]
    return chosen


def _factor(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(1, 1, out, in) or (1, out, in) -> (in, out)"""
    return weights.reshape(weights.shape[-2:]).to(dtype).T


def _shrink(
    inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor, scaling: float = 1.0
) -> None:
    found = inputs.to(output.dtype) @ _factor(weights, output.dtype)
    output[:, : found.shape[1]] = scaling * found


def _expand(
    inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor, add_inputs: bool = True
) -> None:
    width = min(weights.shape[-2], output.shape[1])
    _expand_slice(inputs, weights[..., :width, :], output, indices, 0, width, add_inputs)


def _expand_slice(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    part = output[:, slice_offset : slice_offset + slice_size]
    found = inputs.to(output.dtype) @ _factor(weights, output.dtype)
    if add_inputs:
        part += found
    else:
        part[:] = found
