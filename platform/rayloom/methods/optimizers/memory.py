"""How much memory the state of an optimizer takes."""

from __future__ import annotations

from typing import Any

import torch


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in an optimizer's `state_dict`, at any depth; one that several entries share counts once.

    A tensor that stands for others (torchao's 8-bit state) counts as what it is made of.
    """
    return sum({id(tensor): tensor.nbytes for tensor in _tensors(state)}.values())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            return [tensor for name in names for tensor in _tensors(getattr(value, name))]
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []
