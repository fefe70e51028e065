"""From the job's `optimizer` part and a model to the optimizer itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from rayloom.errors import RequestError
from rayloom.methods.optimizers.adam_mini import AdamMini, block_count
from rayloom.methods.optimizers.apollo import Apollo
from rayloom.methods.optimizers.badam import BAdam, layer_choice, ratio_choice
from rayloom.methods.optimizers.combined import Combined
from rayloom.methods.optimizers.config import (
    AdamMiniConfig,
    ApolloConfig,
    BadamConfig,
    GaloreConfig,
    LibraryConfig,
    MuonConfig,
)
from rayloom.methods.optimizers.galore import GaLore
from rayloom.methods.optimizers.layerwise import LayerWise
from rayloom.methods.optimizers.low_rank import InnerFactory, LowRank
from rayloom.methods.optimizers.targets import (
    Group,
    decay_groups,
    hidden_matrices,
    layer_blocks,
    linear_weights,
    trained,
)


@dataclass(frozen=True)
class Setting:
    """What an optimizer is made from beside its own config."""

    model: Any
    """Its parameters that ask for gradients train."""
    learning_rate: float
    weight_decay: float
    decayed: Collection[str]
    """Names of the parameters that decay."""
    seed: int

    def groups(self, named: list[tuple[str, nn.Parameter]]) -> list[Group]:
        return decay_groups(named, self.decayed, self.learning_rate, self.weight_decay)


def make_optimizer(config: Any, setting: Setting) -> torch.optim.Optimizer | None:
    """The optimizer of a config; None: it is one of a library's, for which see `library_class`.

    Raises:
        RequestError: the config does not fit the model, such as a target that it has not.
    """
    make = _MAKERS.get(type(config))
    return make(config, setting) if make else None


def library_class(config: Any, args: transformers.TrainingArguments, model: Any) -> tuple[Any, dict[str, Any]]:
    """(class, keyword arguments) of a library's optimizer, as `transformers.Trainer` takes them.

    Transformers knows the class and its fixed arguments; the config's go in here and not through `optim_args`, whose
    text reaches some classes as it is (`block_size="256"`).

    Args:
        args: whose `optim` is the config's type.
    """
    kind, arguments = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
    if isinstance(config, LibraryConfig):
        own = config.arguments()
        arguments |= {
            name: getattr(torch, value) if name.endswith("_dtype") else value
            for name, value in own.items()
            if value is not None
        }
    return kind, arguments


def lora_plus(config: LibraryConfig, args: transformers.TrainingArguments, model: Any) -> torch.optim.Optimizer:
    """A library's optimizer with PEFT's groups for LoRA+; each has `lr_ratio`, its peak rate over the job's."""
    from peft.optimizers import create_loraplus_optimizer

    assert config.lora_plus_ratio is not None
    kind, arguments = library_class(config, args, model)
    optimizer = create_loraplus_optimizer(
        model,
        kind,
        loraplus_lr_ratio=config.lora_plus_ratio,
        loraplus_weight_decay=args.weight_decay,
        loraplus_lr_embedding=config.lora_plus_embedding_rate,
        **arguments,
    )
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in optimizer.param_groups:
        group["lr_ratio"] = group["lr"] / args.learning_rate
    return optimizer


def optim_name(config: Any) -> str:
    """What `TrainingArguments.optim` gets: the type where transformers makes the optimizer."""
    return "adamw_torch" if type(config) in _MAKERS else str(config.type)


# --- of our own -----------------------------------------------------------------------------------------------------


def _adamw(config: Any) -> InnerFactory:
    return partial(torch.optim.AdamW, betas=(config.beta1, config.beta2), eps=config.eps)


def _galore_inner(config: GaloreConfig) -> InnerFactory:
    if "adafactor" in config.type:
        return partial(transformers.Adafactor, scale_parameter=False, relative_step=False)
    if "8bit" in config.type:
        from bitsandbytes.optim import AdamW8bit

        return partial(AdamW8bit, betas=(config.beta1, config.beta2), eps=config.eps)
    return _adamw(config)


def _galore(config: GaloreConfig, setting: Setting) -> torch.optim.Optimizer:
    make = partial(GaLore, rank=config.rank, scale=config.scale, proj_type=config.proj_type)
    return _low_rank(config, setting, make, _galore_inner(config))


def _apollo(config: ApolloConfig, setting: Setting) -> torch.optim.Optimizer:
    make = partial(
        Apollo,
        rank=config.rank,
        scale=config.scale,
        scale_type=config.scale_type,
        proj=config.proj,
        proj_type=config.proj_type,
        seed=setting.seed,
    )
    return _low_rank(config, setting, make, _adamw(config))


def _low_rank(
    config: GaloreConfig | ApolloConfig, setting: Setting, make: Callable[..., LowRank], inner: InnerFactory
) -> torch.optim.Optimizer:
    targets = linear_weights(setting.model, config.target)
    matrices = {weight for weight in targets if min(weight.shape) > config.rank}
    if not matrices:
        largest = max((min(weight.shape) for weight in targets), default=0)
        raise RequestError(
            f"optimizer.rank: {config.rank} must be below the shorter side of the matrices to project, "
            f"which is at most {largest} here"
        )
    named = trained(setting.model)
    make = partial(make, inner=inner, update_proj_gap=config.update_proj_gap)
    if not config.type.endswith("_layerwise"):
        plain = setting.groups([(name, weight) for name, weight in named if weight not in matrices])
        return make(plain, setting.groups([(name, weight) for name, weight in named if weight in matrices]))
    optimizers: list[torch.optim.Optimizer] = []
    projected = 0
    for name, weight in named:
        groups = setting.groups([(name, weight)])
        if weight in matrices:
            optimizers.append(make([], groups, first_index=projected))
            projected += 1
        else:
            optimizers.append(inner(groups))
    return LayerWise(optimizers)


def _badam(config: BadamConfig, setting: Setting) -> torch.optim.Optimizer:
    layers, outside = layer_blocks(setting.model)
    if not layers:
        raise RequestError("optimizer.type: badam finds no layers that train in this model")
    if config.mode == "layer":
        blocks = [*layers, outside] if config.outside_layers and outside else layers
        if config.start_block is not None and config.start_block >= len(blocks):
            raise RequestError(f"optimizer.start_block: {config.start_block} must be below {len(blocks)}, the blocks")
        choose = layer_choice(blocks, config.switch_mode, config.start_block, setting.seed)
    else:
        blocks = layers
        weights = [weight for layer in layers for weight in layer]
        choose = ratio_choice(weights, config.update_ratio, config.mask_mode, setting.seed)
    members = {weight for block in blocks for weight in block}
    for weight in outside if not members.issuperset(outside) else []:
        weight.requires_grad_(False)  # stands still for the whole job, so nobody need compute its gradient
    return BAdam(
        setting.groups([(name, weight) for name, weight in trained(setting.model) if weight in members]),
        _adamw(config),
        choose,
        switch_interval=config.switch_interval,
        freezes=config.mode == "layer",
    )


def _muon(config: MuonConfig, setting: Setting) -> torch.optim.Optimizer:
    matrices, named = hidden_matrices(setting.model), trained(setting.model)
    hidden = setting.groups([(name, weight) for name, weight in named if weight in matrices])
    others = setting.groups([(name, weight) for name, weight in named if weight not in matrices])
    if not hidden:
        raise RequestError("optimizer.type: muon finds no matrix of a hidden layer that trains in this model")
    muon = torch.optim.Muon(
        hidden,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        adjust_lr_fn=config.adjust_lr_fn,
    )
    return Combined([muon, _adamw(config)(others)] if others else [muon])


def _adam_mini(config: AdamMiniConfig, setting: Setting) -> torch.optim.Optimizer:
    text = setting.model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    head_size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    named = trained(setting.model)
    blocks = {weight: block_count(name, weight, head_size) for name, weight in named}
    return AdamMini(setting.groups(named), blocks, betas=(config.beta1, config.beta2), eps=config.eps)


_MAKERS: dict[type, Callable[[Any, Setting], torch.optim.Optimizer]] = {
    GaloreConfig: _galore,
    ApolloConfig: _apollo,
    BadamConfig: _badam,
    MuonConfig: _muon,
    AdamMiniConfig: _adam_mini,
}
