"""Which layers `target: all` means."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def linear_layers(model: Any, *, skip: Collection[str] = ()) -> list[str]:
    """Full names of every linear layer but the output head, in the model's order.

    A linear layer is a `torch.nn.Linear`, quantized ones among them, or GPT-2's `Conv1D`, which is one with its weight
    transposed. Not one are weights that a model multiplies with by itself: the experts of most mixtures stand in one
    parameter with three dimensions, which no adapter on modules reaches.

    Args:
        model: a transformers model without adapters.
        skip: names of modules inside which no layer counts, such as the vision tower of a model that reads text here.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    unadapted = {f"{name}." for name in (*skip, *_opaque(model))}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and not any(f"{name}.".startswith(prefix) for prefix in unadapted)
    ]


def _opaque(model: Any) -> list[str]:
    """Linear layers whose output is not a function of `forward(input)` alone: an adapter around them does nothing."""
    return []
