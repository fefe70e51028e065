"""Mixtures of experts: the router's loss, and blocks that ZeRO-3 must treat as a whole."""

from __future__ import annotations

from typing import Any

from rayloom.errors import RequestError
from rayloom.models.architecture import Architecture


def check_router_loss(architecture: Architecture) -> None:
    """Refuse `model.moe_aux_loss` for a model that has no such loss.

    Raises:
        RequestError: it has no experts, or balances them in another way.
    """
    if not architecture.experts:
        raise RequestError(
            f"model.moe_aux_loss: a model of type {architecture.model_type} has no experts; leave it out"
        )
    if not architecture.has_router_loss:
        raise RequestError(
            f"model.moe_aux_loss: models of type {architecture.model_type} have no such loss; leave it out"
        )


def use_router_loss(model: Any, coefficient: float, *, batches_per_step: int) -> None:
    """Add the router's loss (Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equation 4) to the model's own.

    A step's loss is the sum over its batches of what the model returns, since each batch's share of the tokens is in
    it already. The router's loss is a mean per batch, so that it counts `1 / batches_per_step` in each.

    Args:
        coefficient: what the mean of the router's loss over the step's batches is multiplied by.
        batches_per_step: of all workers together.
    """
    text = model.config.get_text_config(decoder=True)
    text.output_router_logits = True
    text.router_aux_loss_coef = coefficient
    for module in model.modules():
        if hasattr(module, "router_aux_loss_coef"):
            module.router_aux_loss_coef = coefficient / batches_per_step


def expert_blocks(model: Any) -> list[type]:
    """Classes of the modules that hold experts and choose among them."""
    return list({type(module): None for module in model.modules() if hasattr(module, "experts")})


def mark_expert_blocks(model: Any) -> list[type]:
    """Let ZeRO-3 gather the weights of such a block together. Returns the classes.

    Which experts run differs from rank to rank; gathered one by one, the ranks would wait for each other for ever.
    """
    classes = expert_blocks(model)
    if classes:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, classes)
    return classes
