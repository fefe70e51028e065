"""Whether a method fits the model, told from `config.json` before anything is loaded."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.config import LoraConfig, OftConfig
from rayloom.methods.names import modules_named, nearest
from rayloom.methods.skeleton import skeleton
from rayloom.methods.targets import linear_layers


def check_method(job: JobConfig) -> None:
    """Refuse a method that does not fit the model. Builds the model without weights, and the method on it.

    Raises:
        RequestError: with the key, the value and what would be right.
    """
    method = job.method
    model = skeleton(job.model)
    _check_quantized(job, model)
    _check_names(method, model)
    if isinstance(method, LoraConfig) and method.adapters:
        _check_adapters(job, method)
    sizes = {name: size for name, module in model.named_modules() if (size := _layer_size(module))}
    targets = _plain_targets(method, model) or _peft_targets(method, model)
    if isinstance(method, LoraConfig) and not method.continues:
        _check_rank(method, sizes, targets, model.config)
    if isinstance(method, OftConfig):
        _check_blocks(method, sizes, targets)


def _plain_targets(method: Any, model: Any) -> list[str]:
    """The layers of an adapter that PEFT can put on any model, so that it need not be asked: to import it takes
    most of a second of a job's start (tests/bench/NOTES.md). Empty where it must be."""
    is_plain = isinstance(method, LoraConfig) and not (method.adapters or method.extra_modules)
    return linear_layers(model) if is_plain and method.target == "all" else []


def _peft_targets(method: Any, model: Any) -> list[str]:
    """The layers that the method adapts, by putting it on the model."""
    from rayloom.methods.attach import attach_method

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT changes by itself with a warning is refused by the other checks
        attached = attach_method(model, method, empty=True)
    return list(getattr(attached, "targeted_module_names", []))


def _check_quantized(job: JobConfig, model: Any) -> None:
    method = job.method
    on_load = job.model.quantization
    is_quantized = bool(on_load) or hasattr(model.config, "quantization_config")
    if method.type == "freeze" and is_quantized:
        raise RequestError("method.type: freeze trains the model's own weights, and quantized ones cannot; use lora")
    if not isinstance(method, LoraConfig):
        return
    if method.init == "loftq" and getattr(on_load, "type", None) not in ("nf4", "fp4"):
        raise RequestError(
            "method.init: loftq makes up for what is lost when weights are quantized to 4 bits on load, and these are "
            "not; set model.quantization: nf4, or leave `init` out"
        )
    if is_quantized and method.merged:
        raise RequestError(
            "method.adapters: adapters cannot be merged into quantized weights without loss; merge them first, or "
            "let a single one go on"
        )


def _check_names(method: Any, model: Any) -> None:
    modules_named(model, getattr(method, "extra_modules", []), "method.extra_modules")
    target = getattr(method, "target", "all")
    if isinstance(target, list) and not getattr(method, "continues", False):
        modules_named(model, target, "method.target")
    elif target not in ("all", "auto"):
        known = [name for name, _ in model.named_modules() if name]
        try:
            matches = any(re.fullmatch(target, name) for name in known)
        except re.error as error:
            raise RequestError(f"method.target: {target!r} is no regular expression: {error}") from None
        if not matches:
            raise RequestError(
                f"method.target: no module's whole name matches {target!r}; for all modules of a name write a list "
                f"([{target}]){nearest(target, known)}"
            )


def _check_adapters(job: JobConfig, method: LoraConfig) -> None:
    from rayloom.methods.adapter_folder import check_adapter, read_adapter_config

    for number, folder in enumerate(method.adapters):
        check_adapter(folder, f"method.adapters[{number}]", skeleton(job.model), job.model.path)
    if not method.continues:
        return
    key = f"method.adapters[{len(method.adapters) - 1}]"
    config: Any = read_adapter_config(method.adapters[-1], key)
    if config.peft_type != "LORA":
        raise RequestError(f"{key}: {method.adapters[-1]} is {config.peft_type.value}; only LoRA adapters go on")
    own = {"rank": config.r, "dropout": config.lora_dropout, "rslora": config.use_rslora, "dora": config.use_dora}
    if method.alpha is not None:
        own["alpha"] = config.lora_alpha
    defaults = LoraConfig()
    for name, value in own.items():
        said = getattr(method, name)
        if said not in (value, getattr(defaults, name)):
            raise RequestError(
                f"method.{name}: {said}, but the adapter that goes on has {value}; leave it out, or say "
                "new_adapter: true"
            )


def _layer_size(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer; None for any other module."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None


def _check_rank(method: LoraConfig, sizes: dict[str, tuple[int, int]], targets: list[str], config: Any) -> None:
    """A rank above a layer's size adds parameters and nothing that they could learn. Gates may be that small: they have
    one output, or one for each expert."""
    experts = {getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    measured = [(min(sizes[name]), name) for name in targets if name in sizes and sizes[name][1] not in {1, *experts}]
    if not measured:
        return
    smallest, name = min(measured)
    if method.rank > smallest:
        raise RequestError(
            f"method.rank: {method.rank} is above the size of {name} ({sizes[name][0]} x {sizes[name][1]}); "
            f"at most {smallest}, or leave that layer out of method.target"
        )


def _check_blocks(method: OftConfig, sizes: dict[str, tuple[int, int]], targets: list[str]) -> None:
    from rayloom.methods.tuners import OFT_BLOCK

    key = "blocks" if method.blocks else "block_size"
    value = method.blocks or method.block_size or OFT_BLOCK
    inputs = {sizes[name][0]: name for name in targets if name in sizes}
    for count, name in inputs.items():
        if count % value:
            common = math.gcd(*inputs)
            possible = ", ".join(str(n) for n in range(2, common + 1) if common % n == 0)
            raise RequestError(
                f"method.{key}: {value} does not divide the {count} inputs of {name}; possible are {possible}"
            )
