"""Attach a method to a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rayloom.methods import freeze, lora, prompts, tuners
from rayloom.methods.config import LoraConfig, MethodConfig


def _full(model: Any, method: Any, empty: bool) -> Any:
    return model


_ATTACH: dict[str, Callable[[Any, Any, bool], Any]] = {
    "full": _full,
    "freeze": freeze.attach,
    "oft": tuners.attach_oft,
    "adapter": tuners.attach_adapter,
    "ia3": tuners.attach_ia3,
    "vera": tuners.attach_vera,
    "peft": tuners.attach_peft,
    "prompt": prompts.attach_prompt,
    "p_tuning": prompts.attach_p_tuning,
    "prefix": prompts.attach_prefix,
}


def attach_method(model: Any, method: MethodConfig, new_tokens: Sequence[int] = (), *, empty: bool = False) -> Any:
    """The model as the method trains it: what trains requires gradients, everything else does not.

    `full` and `freeze` return the model itself, changed in place; the others return a `peft.PeftModel` around it. What
    trains stands in fp32, also where the model's own weights are in half precision: autocast computes, and small
    updates are not rounded away.

    Args:
        model: a transformers model that has just been loaded; `name_or_path` says from where.
        new_tokens: ids of added tokens, whose rows train beside LoRA's adapters.
        empty: build the same modules without memory and without values, as `rayloom.methods.check` does on a model
            that has none.

    Raises:
        RequestError: the method does not fit the model.
    """
    if isinstance(method, LoraConfig):
        model = lora.attach(model, method, new_tokens, empty)
    else:
        model = _ATTACH[method.type](model, method, empty)
    if method.type == "full":  # whose precision the loader has settled
        return model
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if is_sharded and method.type == "adapter":  # multiplies with the model's own weights, without a cast between
        return model
    for parameter in model.parameters():
        is_whole = not hasattr(parameter, "ds_id")  # ZeRO-3 keeps its own fp32 copy of a shard
        if parameter.requires_grad and is_whole and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return model
