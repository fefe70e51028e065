"""The tuners of PEFT that need no more than their configuration: OFT, LLaMA-Adapter, IA3, VeRA, and any by its name."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from rayloom.errors import RequestError, first_line
from rayloom.methods.config import AdapterConfig, Ia3Config, OftConfig, PeftConfig, VeraConfig
from rayloom.methods.names import nearest
from rayloom.methods.targets import linear_layers
from rayloom.methods.wrap import extra_modules, wrap

_TASK = peft.TaskType.CAUSAL_LM
OFT_BLOCK = 32
"""Rows and columns of a rotation where a job does not say."""

# Tuners that a job cannot train by their configuration alone, and why.
REFUSED_TUNERS = {
    "ADALORA": "its ranks must be reassigned after every step; `type: lora` has fixed ranks",
    "ADAPTION_PROMPT": "write `type: adapter`",
    "CARTRIDGE": "it learns from the cache of a long text, not from examples",
    "CPT": "its loss needs the kind of every token",
    "MULTITASK_PROMPT_TUNING": "it needs the task of every example; write `type: prompt`",
    "POLY": "it needs the task of every example",
    "PREFIX_TUNING": "write `type: prefix`",
    "PROMPT_TUNING": "write `type: prompt`",
    "P_TUNING": "write `type: p_tuning`",
    "SHADOW": "it trains a second model beside the first",
    "XLORA": "it mixes trained LoRA adapters and trains none",
}
_OWN_TARGETS = ("IA3", "LN_TUNING", "TRAINABLE_TOKENS")  # what they train is no linear layer, or PEFT knows it better
_OWN_BUSINESS = {field.name for field in dataclasses.fields(peft.PeftConfig)}


def attach_oft(model: Any, method: OftConfig, empty: bool) -> Any:
    """Rotations of the inputs of frozen layers (OFTv2)."""
    config = peft.OFTConfig(
        task_type=_TASK,
        r=method.blocks or 0,
        oft_block_size=0 if method.blocks else method.block_size or OFT_BLOCK,
        module_dropout=method.dropout,
        target_modules=linear_layers(model) if method.target == "all" else method.target,
        use_cayley_neumann=not method.exact,
        coft=method.constrained is not None,
        eps=method.constrained or 6e-5,
        block_share=method.shared,
        modules_to_save=extra_modules(model, method.extra_modules),
    )
    return wrap(model, config, "method.target", empty)


def attach_adapter(model: Any, method: AdapterConfig, empty: bool) -> Any:
    """Prompts behind zero gates in the attention of the last layers."""
    count = model.config.num_hidden_layers
    layers = method.layers or (count - 2 if count > 2 else count)
    config = peft.AdaptionPromptConfig(task_type=_TASK, adapter_len=method.prompt_length, adapter_layers=layers)
    return wrap(model, config, "method.layers" if method.layers else "method.type", False)


def attach_ia3(model: Any, method: Ia3Config, empty: bool) -> Any:
    """Scales of keys, values and feed-forward activations."""
    target = None if method.target == "auto" else method.target
    config = peft.IA3Config(
        task_type=_TASK,
        target_modules=target,
        feedforward_modules=None if target is None else method.feedforward,
        modules_to_save=extra_modules(model, method.extra_modules),
    )
    return wrap(model, config, "method.target", empty)


def attach_vera(model: Any, method: VeraConfig, empty: bool) -> Any:
    """Scales around random factors, which all layers share."""
    config = peft.VeraConfig(
        task_type=_TASK,
        r=method.rank,
        vera_dropout=method.dropout,
        d_initial=method.d_initial,
        target_modules=linear_layers(model) if method.target == "all" else method.target,
        modules_to_save=extra_modules(model, method.extra_modules),
    )
    return wrap(model, config, "method.target", empty)


def attach_peft(model: Any, method: PeftConfig, empty: bool) -> Any:
    """Any tuner of PEFT, configured by its own fields."""
    return wrap(model, named_config(method), "method.fields", empty)


def named_config(method: PeftConfig) -> peft.PeftConfig:
    """The configuration that `peft_type` and `fields` say.

    Raises:
        RequestError: no such tuner, one that a job cannot train, or fields that it has not.
    """
    name = method.peft_type.upper()
    if name in REFUSED_TUNERS:
        raise RequestError(f"method.peft_type: {name} cannot be trained by its fields alone: {REFUSED_TUNERS[name]}")
    known = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    usable = sorted(set(known) - set(REFUSED_TUNERS))
    if name not in known:
        raise RequestError(f"method.peft_type: PEFT has no {method.peft_type!r}{nearest(name, usable)}")
    kind = known[name]
    allowed = {field.name for field in dataclasses.fields(kind) if field.init} - _OWN_BUSINESS
    unknown = [field for field in method.fields if field not in allowed]
    if unknown:
        raise RequestError(
            *(f"method.fields: {name} has no field {field!r}{nearest(field, sorted(allowed))}" for field in unknown)
        )
    if name == "LORA" and str(method.fields.get("init_lora_weights", True)).lower() not in ("true", "gaussian"):
        raise RequestError("method.fields: write `type: lora` with `init`, which saves what such a start needs")
    fields: dict[str, Any] = {"task_type": _TASK, **method.fields}
    if "target_modules" in allowed and name not in _OWN_TARGETS:
        fields.setdefault("target_modules", "all-linear")
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:
        raise RequestError(f"method.fields: {name}: {first_line(error)}") from None
