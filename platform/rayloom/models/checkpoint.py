"""Whether a checkpoint's tensors are the model's, told from the files' headers before any weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayloom.errors import RequestError
from rayloom.models.config import ModelConfig
from rayloom.models.source import some_names

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Differences:
    """What a checkpoint and a model do not have in common, each in the order of names."""

    missing: tuple[str, ...] = ()
    """Parameters of the model that the checkpoint has not."""
    extra: tuple[str, ...] = ()
    """Tensors of the checkpoint that the model has no place for."""
    misshapen: tuple[str, ...] = ()
    """Tensors of another shape, each as `name: checkpoint (2, 3), model (2, 4)`."""


def tensor_shapes(folder: Path) -> Shapes:
    """Names and shapes of the tensors in a folder's safetensors files, read from their headers.

    Raises:
        RequestError: a file is no safetensors file, or ends too early.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    shapes: Shapes = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise RequestError(f"model.path: {file} cannot be read: {error}; is the download complete?") from None
    return shapes


def compare(model: Any, checkpoint: Shapes) -> Differences:
    """What differs between a model (on the meta device will do) and the tensors of a checkpoint.

    Tensors are renamed as transformers renames them when it loads: families whose checkpoints name or cut their weights
    otherwise than the model does have rules for that. Only tensors that are not cut are compared in shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    found: set[str] = set()
    extra, misshapen = [], []
    for name, shape in checkpoint.items():
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = name, None
        if target not in parameters:
            extra.append(name)
            continue
        found.add(target)
        if pattern is not None:  # cut or joined: the one tensor becomes all that its rule makes
            first, *others = by_pattern[pattern].target_patterns
            found |= {target.replace(first, other) for other in others}
        elif tuple(parameters[target].shape) != shape:
            misshapen.append(f"{name}: checkpoint {shape}, model {tuple(parameters[target].shape)}")
    missing = set(parameters) - found
    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        if one in found or other in found:
            missing -= {one, other}
    return Differences(
        tuple(sorted(_without(missing, model._keys_to_ignore_on_load_missing))),
        tuple(sorted(_without(extra, _may_be_extra(model)))),
        tuple(sorted(misshapen)),
    )


def _may_be_extra(model: Any) -> set[str]:
    """Patterns of what older checkpoints hold and models compute anew, as transformers has them."""
    buffers = [name for name, _ in model.named_buffers()]
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return patterns


def _without(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    ignored = [re.compile(pattern) for pattern in patterns or ()]
    return [name for name in names if not any(pattern.search(name) for pattern in ignored)]


def check_differences(model: ModelConfig, differences: Differences) -> None:
    """Refuse a checkpoint that is not the model's, naming the tensors.

    Raises:
        RequestError: there are differences; extra tensors only where `allow_extra_tensors` does not allow them.
    """
    faults = []
    if differences.missing:
        faults.append(f"lacks {len(differences.missing)} tensors of the model: {some_names(list(differences.missing))}")
    if differences.misshapen:
        faults.append(f"has tensors of another shape: {some_names(list(differences.misshapen))}")
    if differences.extra and not model.allow_extra_tensors:
        faults.append(
            f"holds {len(differences.extra)} tensors that the model has no place for: "
            f"{some_names(list(differences.extra))} (model.allow_extra_tensors: true leaves them out)"
        )
    if faults:
        raise RequestError(*(f"model.path: the checkpoint {model.path} {fault}" for fault in faults))
