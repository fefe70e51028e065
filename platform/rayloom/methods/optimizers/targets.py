"""Which weights of a model an optimizer treats in its own way, and in which groups the others train."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rayloom.errors import RequestError

Group = dict[str, Any]

_LAYER = re.compile(r"^(.*?\.\d+)\.")


def linear_weights(model: nn.Module, target: Literal["all"] | list[str]) -> set[nn.Parameter]:
    """Weights of the linear layers that train: all but the output head, or those whose module's name ends as told.

    Raises:
        RequestError: a name in `target` that is no linear layer's.
    """
    head = _head(model)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    if target == "all":
        found = list(linear.values())
    else:
        found = []
        for wanted in target:
            named = [module for name, module in linear.items() if f".{name}".endswith(f".{wanted}")]
            if not named:
                known = sorted({name.rpartition(".")[2] for name in linear})
                near = difflib.get_close_matches(wanted, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"this model has {', '.join(known)}"
                raise RequestError(f"optimizer.target: no linear layer is named {wanted!r}; {hint}")
            found += named
    # A head that is tied to the embeddings is not among the modules left, but its weight may be: never project it.
    wanted_weights = {module.weight for module in found}
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return {p for p in model.parameters() if p.requires_grad and p in wanted_weights and p not in embeddings}


def _head(model: nn.Module) -> Any:
    get: Any = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The 2-D weights that train, without embeddings and output head."""
    head = _head(model)
    outer = {p for m in model.modules() if isinstance(m, nn.Embedding) or m is head for p in m.parameters()}
    return {p for p in model.parameters() if p.requires_grad and p.ndim == 2} - outer


def layer_blocks(model: nn.Module) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """(the weights of each layer, the weights outside of the layers), those that train, in the model's order.

    A layer is what is numbered in parameters' names: `model.layers.3`, `transformer.h.3`.
    """
    layers: dict[str, list[nn.Parameter]] = {}
    outside = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if match := _LAYER.match(name):
            layers.setdefault(match[1], []).append(parameter)
        else:
            outside.append(parameter)
    return list(layers.values()), outside


def decay_groups(
    named: list[tuple[str, nn.Parameter]], decayed: Collection[str], learning_rate: float, weight_decay: float
) -> list[Group]:
    """Parameter groups with and without weight decay, none of them empty.

    Args:
        decayed: names of the parameters that decay.
    """
    groups: list[Group] = [
        {
            "params": [parameter for name, parameter in named if (name in decayed) == decays],
            "weight_decay": weight_decay if decays else 0.0,
            "lr": learning_rate,
        }
        for decays in (True, False)
    ]
    return [group for group in groups if group["params"]]


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of what trains."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def working_dtype(parameter: torch.Tensor) -> torch.dtype:
    """What moments and steps are computed in: fp32 for weights in 16 bits, else the weights' own format."""
    return torch.float32 if parameter.dtype in (torch.bfloat16, torch.float16) else parameter.dtype
