"""Which layers `target: all` means."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rayloom.models.parts import frozen_modules

# Fused kernels of these models take the weight itself and pass an adapter by; PEFT refuses it there.
_FUSED = {"falcon_h1": "out_proj", "falcon_mamba": "out_proj", "mamba": "out_proj", "mamba2": "out_proj"}
_FUSED |= {"nemotron_h": "out_proj"}

# A `forward` of their own that computes what a linear layer does.
_PLAIN = {"FalconLinear"}

# PEFT renames the adapter's keys to those of the checkpoint when it loads it, and then does not find the layer.
_LOST_ON_LOADING = {"laguna": "shared_experts"}


def peft_targets(model: Any, target: str | list[str]) -> tuple[str | list[str], list[str]]:
    """`target_modules` and `target_parameters` by which PEFT adapts what a job's `target` says, and nothing else.

    `all` is every linear layer of the language model but the output head.

    In mixtures of experts that transformers 4 had as modules, PEFT takes layers with an expert's name (`gate_proj` of
    a dense layer or of a shared expert) for the experts of an old adapter, and adapts the experts instead. There such
    a layer goes by its weight. Adapters on weights have no dropout and no DoRA.
    """
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    if target != "all":
        return target, []
    layers = linear_layers(model)
    pattern = _MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    experts = tuple(f".{name}" for name in _MOE_TARGET_MODULE_MAPPING.get(pattern or "", ()))
    modules = [name for name in layers if not name.endswith(experts)] if experts else list(layers)
    taken = set(modules)
    return modules, [f"{name}.weight" for name in layers if name not in taken]


def linear_layers(model: Any) -> list[str]:
    """Full names of every linear layer but the output head, in the model's order.

    A linear layer is a `torch.nn.Linear`, quantized ones among them, hqq's, which is none by its class, or GPT-2's
    `Conv1D`, which is one with its weight transposed. Left out are

    - what does not train of a model with several parts, such as the vision tower of one that reads text here;
    - weights that a model multiplies with by itself, such as experts that stand in one parameter of three dimensions:
      there is no module to put an adapter on;
    - layers that are a `Linear` by name only: their own `forward` returns or takes something else (routers, groups);
    - layers that share their weight with another one (Zamba's attention): each would get an adapter of its own, and
      the weight cannot take both when they are merged;
    - layers of a model type that are known to pass an adapter by, or to lose it on loading.

    Args:
        model: a transformers model without adapters.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    modules = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) or type(module).__name__ == "HQQLinear"
    ]
    uses = Counter(_weight(module) for _, module in modules)
    head, prefixes = model.get_output_embeddings(), tuple(f"{name}." for name in frozen_modules(model))
    model_type = str(model.config.get_text_config(decoder=True).model_type)
    unfit = {table[model_type] for table in (_FUSED, _LOST_ON_LOADING) if model_type in table}
    return [
        name
        for name, module in modules
        if module is not head
        and not f"{name}.".startswith(prefixes)
        and not unfit & set(name.split("."))
        and (uses[_weight(module)] == 1 or (head is not None and _weight(module) == _weight(head)))
        and not _has_a_forward_of_its_own(module)
    ]


def _weight(module: Any) -> int:
    """Which weight a layer multiplies with."""
    return id(getattr(module, "weight", module))


def _has_a_forward_of_its_own(module: Any) -> bool:
    """Whether a model's code redefines `forward`; what quantizes a layer does too, and keeps what it computes."""
    import torch

    forward_of = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    of_a_model = issubclass(forward_of, torch.nn.Linear) and forward_of.__module__.startswith("transformers.models.")
    return of_a_model and forward_of.__name__ not in _PLAIN
