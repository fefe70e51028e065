"""A LoRA layer's product without the dense intermediates that PEFT makes of it.

PEFT computes `y = W x + scaling B(A x)` as it is written: under autocast it copies the input to float32 for the adapter
and back for the product, keeps a copy for each adapter, and makes two more tensors of the output's size. Here the small
product is added into the big one, and of the input nothing is kept but itself, which the layers beside it share. The
same backward: `dx` is added into the big product too (LoRA, https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear

from rayloom.models.wide_products import FrozenLinear, adapted_gradients, adapted_linear, is_wide


def use_lean_products(model: torch.nn.Module) -> None:
    """Let every plain LoRA layer around an ordinary linear layer compute lean. Others stay as they are: quantized
    ones, and where PEFT has a variant of its own, such as DoRA."""
    for module in model.modules():
        if type(module) is Linear and type(module.get_base_layer()) in (torch.nn.Linear, FrozenLinear):
            module.__class__ = LeanLinear


class LeanLinear(Linear):
    """PEFT's layer, whose forward pass is lean where nothing but its one adapter is asked for."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = self._only_adapter() if not args and not kwargs else None
        if adapter is None:
            whole: torch.Tensor = super().forward(x, *args, **kwargs)
            return whole
        base, down, up = self.get_base_layer(), self.lora_A[adapter].weight, self.lora_B[adapter].weight
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        product: Any = _Product.apply
        rows = x.to(dtype).flatten(0, -2)
        if not is_wide(rows):  # there the adapter is computed in float32 as it is
            down, up = down.to(dtype), up.to(dtype)
        lean: torch.Tensor = product(rows, base.weight.to(dtype), bias, down, up, self.scaling[adapter])
        return lean.view(*x.shape[:-1], lean.shape[-1])

    def _only_adapter(self) -> str | None:
        """The adapter, if it is the only active one and plain; sharded weights are there only within their modules."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name: str = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return None
        dropout, weight = self.lora_dropout[name], self.get_base_layer().weight
        drops = self.training and not isinstance(dropout, torch.nn.Identity)
        return None if drops or weight.requires_grad or hasattr(weight, "ds_id") else name


class _Product(torch.autograd.Function):
    """`x W' + bias + scaling (x A') B'` of rows; W and the bias get no gradient. All are of one dtype, or, where x is
    wide, A and B of any.

    Of rows: a model may write into what a layer returns, and autograd refuses that for views made in here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if is_wide(x):
                y, small = adapted_linear(x, weight, bias, down, up, scaling)
            else:
                y, small = torch.nn.functional.linear(x, weight, bias), x @ down.T
                y.addmm_(small, up.T, alpha=scaling)
        ctx.save_for_backward(x, weight, down, up, small)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, up, small = ctx.saved_tensors
        (dy,) = gradients
        dx: torch.Tensor | None
        if is_wide(x) and ctx.needs_input_grad[0]:
            dx, ddown, dup = adapted_gradients(dy, x, small, weight, down, up, ctx.scaling)
        else:
            dsmall = (dy @ up.to(dy.dtype)) * ctx.scaling
            dx = (dy @ weight).addmm_(dsmall, down) if ctx.needs_input_grad[0] else None
            ddown, dup = dsmall.T @ x, (dy.T @ small.to(dy.dtype)) * ctx.scaling
        return dx, None, None, ddown.to(down.dtype), dup.to(up.dtype), None
