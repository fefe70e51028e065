"""Train some of the model's own layers, or new ones between them (LLaMA-Pro, https://arxiv.org/abs/2401.02415)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from rayloom.errors import RequestError
from rayloom.methods.config import FreezeConfig
from rayloom.methods.names import is_one_of, modules_named, nearest

# What a block's branches end with, as model families name it: the layers whose output is added to the residual stream.
_BRANCH_ENDS = frozenset(
    "o_proj out_proj dense c_proj down_proj fc2 fc_out wo w2 o dense_4h_to_h attn_out ff_out output_linear".split()
)
_PROBE_TOKENS = 8


def attach(model: Any, method: FreezeConfig, empty: bool) -> Any:
    """Freeze all but the chosen layers and modules. `expand` first puts new layers into the model.

    Raises:
        RequestError: more layers than there are, or names that no module has.
    """
    name, layers = layer_list(model)
    if method.expand:
        chosen = expand_layers(model, method.expand, verify=not empty)
        if empty:
            _check_reloads(model)
    else:
        chosen = chosen_layers(method, len(layers))
    parts = {f"{name}.{index}" for index in chosen}
    if method.modules:
        parts = {module for part in parts for module in _named_within(model, part, method.modules)}
    parts |= set(modules_named(model, method.extra_modules, "method.extra_modules"))
    model.requires_grad_(False)
    for part in parts:
        model.get_submodule(part).requires_grad_(True)
    return model


def layer_list(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """The model's stack of layers, and its name. In a composite model it is the text side's.

    Raises:
        RequestError: the model has no list of as many modules as it has layers.
    """
    text = model.config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if not stacks:
        raise RequestError(
            f"method.type: freeze: {model.config.model_type} has no plain stack of layers to choose from"
        )
    return min(stacks, key=lambda item: (item[0].count("."), "text" not in item[0] and "language" not in item[0]))


def chosen_layers(method: FreezeConfig, count: int) -> list[int]:
    """Numbers of the layers that `first` and `last` name, of `count` in all.

    Raises:
        RequestError: there are not so many.
    """
    for key in ("first", "last"):
        if getattr(method, key) > count:
            raise RequestError(f"method.{key}: {getattr(method, key)} layers, but the model has {count}")
    return sorted({*range(method.first), *range(count - method.last, count)})


def _named_within(model: Any, part: str, names: Iterable[str]) -> list[str]:
    inside = [name for name, _ in model.get_submodule(part).named_modules() if name]
    for name in names:
        if not any(is_one_of(module, [name]) for module in inside):
            raise RequestError(f"method.modules: layer {part} has no module {name!r}{nearest(name, inside)}")
    return [f"{part}.{module}" for module in inside if is_one_of(module, names)]


# --- block expansion --------------------------------------------------------------------------------------------------


def expand_layers(model: Any, count: int, *, verify: bool) -> list[int]:
    """Put `count` new layers into the model, one after each of `count` equal groups; return their numbers.

    A new layer is a copy of the one before it whose branches end in zeros, so that it hands on what it gets. The
    model's configuration is changed with it: what is saved is an ordinary model with more layers.

    Args:
        verify: compute the model's output before and after, on a few tokens.

    Raises:
        RequestError: the layers cannot be divided into so many groups, or a copy would not be the identity.
    """
    name, layers = layer_list(model)
    if len(layers) % count:
        possible = ", ".join(str(n) for n in range(1, len(layers) + 1) if len(layers) % n == 0)
        raise RequestError(
            f"method.expand: {len(layers)} layers cannot be divided into {count} equal groups; possible are {possible}"
        )
    before = _probe(model) if verify else None
    group, configs = len(layers) // count, {id(model.config): model.config}
    text = model.config.get_text_config()
    configs[id(text)] = text  # layers share the configuration, also the new ones
    order = [index for index in range(len(layers)) for _ in range(1 + ((index + 1) % group == 0))]
    blocks = []
    for position, index in enumerate(order):
        is_copy = position > 0 and order[position - 1] == index
        blocks.append(_silent_copy(layers[index], configs) if is_copy else layers[index])
    for position, block in enumerate(blocks):
        for module in block.modules():
            for attribute in ("layer_idx", "layer_id", "layer_number"):
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, position)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, torch.nn.ModuleList(blocks))
    _expand_config(text, len(layers), order)
    if before is not None and not torch.allclose(_probe(model), before, rtol=1e-3, atol=1e-3):
        raise RequestError(f"method.expand: new layers of {model.config.model_type} would change what the model says")
    return [position for position in range(1, len(order)) if order[position] == order[position - 1]]


def _silent_copy(layer: torch.nn.Module, shared: dict[int, Any]) -> torch.nn.Module:
    """A copy of a layer that adds nothing to the residual stream."""
    twin = copy.deepcopy(layer, dict(shared))
    zeroed = 0
    for name, parameter in twin.named_parameters():
        owner = name.split(".")[:-1] if name.endswith((".weight", ".bias")) else name.split(".")
        if owner and (owner[-1] in _BRANCH_ENDS or owner[-1].startswith("down_proj")):
            parameter.data.zero_()
            zeroed += 1
    if not zeroed:
        raise RequestError(f"method.expand: no layer that ends a branch is known in {type(layer).__name__}")
    return twin


def _expand_config(config: Any, count: int, order: list[int]) -> None:
    """Lists with an entry for each layer (`layer_types`) grow with the layers."""
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count and key != "architectures":
            setattr(config, key, [value[index] for index in order])
    config.num_hidden_layers = len(order)


def _check_reloads(model: Any) -> None:
    """Compare an expanded model without weights to the one that its new configuration describes.

    Some families give their layers roles by number, in a formula (every eighth layer is attention): there the saved
    model would load as another one.
    """
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    ours, theirs = dict(model.named_modules()), dict(twin.named_modules())
    differing = [name for name in ours.keys() | theirs.keys() if _traits(ours.get(name)) != _traits(theirs.get(name))]
    if differing:
        raise RequestError(
            f"method.expand: {model.config.model_type} gives layers their roles by number; with new ones between, "
            f"{min(differing)} would become another kind of layer"
        )


def _traits(module: torch.nn.Module | None) -> Any:
    """What tells two layers apart that are made by the same code: kind, shapes and simple attributes."""
    if module is None:
        return None
    simple = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | bool)}
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    simple.pop("training")
    return type(module), shapes, simple


def _probe(model: Any) -> torch.Tensor:
    ids = torch.arange(_PROBE_TOKENS, device=model.device).unsqueeze(0)
    was_training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    return torch.log_softmax(logits, dim=-1)
