"""A tiny configuration of any causal language model that transformers knows: rules first, exceptions as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TOKENS = range(8, 96)
"""Token ids that text may hold: no configuration gives them a meaning of their own."""

_SPECIAL = range(100, 128)
_DROPOUT = ("dropout", "dropout_prob", "dropout_rate", "pdrop", "layerdrop")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")


def model_types() -> list[str]:
    """Every model type that `AutoModelForCausalLM` maps."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_name(model_type: str) -> str:
    """The class that `AutoModelForCausalLM` makes of it."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("tiny_configs.yaml").read_text(encoding="utf-8"))


def tiny_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """About 100 thousand parameters, and still one layer of each kind that the model type has.

    Args:
        fields: of the configuration, whatever the rules say.
    """
    return _shrink(CONFIG_MAPPING[model_type], _data()["types"].get(model_type, {}) | fields)


def _shrink(cls: type[PreTrainedConfig], exceptions: Mapping[str, Any]) -> PreTrainedConfig:
    """The class's default configuration with every cap applied, then the exceptions.

    An exception for a field that is a configuration is a mapping of its fields; `cls` in it names its model type.
    """
    default = _default(cls, exceptions)
    values = _capped(cls, default)
    for name, sub_class in cls.sub_configs.items():
        sub = _value(default, name)
        own = dict(exceptions.get(name) or {})
        if "model_type" in own:
            sub_class = CONFIG_MAPPING[own.pop("model_type")]
        elif isinstance(sub, PreTrainedConfig):
            sub_class = type(sub)
        elif not own:
            continue
        values[name] = _shrink(sub_class, own)
    values |= {name: value for name, value in exceptions.items() if name not in cls.sub_configs}
    return cls(**values)


def _default(cls: type[PreTrainedConfig], exceptions: Mapping[str, Any]) -> PreTrainedConfig:
    if not cls.has_no_defaults_at_init:
        return cls()
    parts = {name: CONFIG_MAPPING[part["model_type"]]() for name, part in exceptions.items() if "model_type" in part}
    return cls(**parts)


def _capped(cls: type[PreTrainedConfig], default: PreTrainedConfig) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for name in names:
        value = _value(default, name)
        if name in _data()["caps"] and isinstance(value, int):
            values[name] = _cap(name, value)
        elif name.endswith(_DROPOUT) and isinstance(value, float):
            values[name] = 0.0
        elif name in _data()["set"]:
            values[name] = _data()["set"][name]
    values |= _special_tokens(names, default)
    values |= _key_value_heads(names, default, values)
    values |= _layers(names, default)
    return values


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field, also under another name; of a field that differs between layers, the value for all others."""
    try:
        return getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return vars(config).get(name)


def _cap(name: str, value: Any) -> Any:
    cap = _data()["caps"].get(name)
    return value if cap is None or not isinstance(value, int) else min(value, cap)


def _special_tokens(names: list[str], default: PreTrainedConfig) -> dict[str, Any]:
    """Tokens beyond the small vocabulary move to its end, each to a place of its own."""
    moved: dict[str, Any] = {}
    free = iter(_SPECIAL)
    for name in names:
        value = _value(default, name)
        if not name.endswith(("_token_id", "_token_index")):
            continue
        if isinstance(value, int) and value >= TOKENS.start:
            moved[name] = next(free)
        elif isinstance(value, list):
            moved[name] = [next(free) if token >= TOKENS.start else token for token in value]
    return moved


def _key_value_heads(names: list[str], default: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Multi-head stays multi-head, multi-query multi-query, and what lies between gets two heads."""
    found = _value(default, "num_key_value_heads")
    if "num_key_value_heads" not in names or not isinstance(found, int):
        return {}
    heads = next((name for name in _HEADS if name in names), None)
    if heads is None:
        return {}
    if found == _value(default, heads):
        return {"num_key_value_heads": values.get(heads, found)}
    return {"num_key_value_heads": min(found, 2)}


def _layers(names: list[str], default: PreTrainedConfig) -> dict[str, Any]:
    """The fewest layers, at least two, that hold every value of every list with one entry a layer."""
    depth = _value(default, "num_hidden_layers")
    lists = {
        name: value
        for name in names
        if isinstance(value := _value(default, name), list | tuple) and len(value) == depth and not _is_numbers(value)
    }
    if not lists:
        return {}
    seen: set[tuple[str, str]] = set()
    chosen = []
    for layer in range(depth):
        kinds = {(name, repr(value[layer])) for name, value in lists.items()}
        if not kinds <= seen:
            chosen.append(layer)
            seen |= kinds
    if len(chosen) < 2:
        chosen = list(range(min(depth, 2)))
    return {
        "num_hidden_layers": len(chosen),
        **{name: [_cap(name, value[layer]) for layer in chosen] for name, value in lists.items()},
    }


def _is_numbers(value: Sequence[Any]) -> bool:
    """Whether a list holds the numbers of layers, and not something for each layer."""
    return len(value) > 2 and list(value) in (list(range(len(value))), list(range(1, len(value) + 1)))
