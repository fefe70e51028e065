"""Normalisation and feed-forward layers that keep fewer tensors for the backward pass.

Written in PyTorch's operations, `RMSNorm` keeps its input a second time, in float32, and a gated feed-forward layer
keeps four tensors of its inner width. Both can do with less: the normalised input and the product of gate and value
are a few operations an element away from what is kept anyway. Activation checkpointing keeps still less, and pays for
it with a second pass through the matrix products; here no matrix product is done twice.

Which layers are meant is not a list of names: a layer is replaced where the replacement gives the very bits that the
layer itself gives (RMSNorm: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; gated layers: Shazeer 2020,
https://arxiv.org/abs/2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Forward = Callable[[Any, torch.Tensor], torch.Tensor]
_ROWS = 4
"""Random inputs on which a layer and its replacement are compared."""


def use_lean_layers(model: torch.nn.Module) -> None:
    """Let every layer that the replacements equal to the bit compute lean on CPU. Others stay as they are, and so do
    those whose weights are sharded or quantized."""
    lean_classes: dict[tuple[type, type], type | None] = {}
    for module in model.modules():
        kind = type(module), type(getattr(module, "act_fn", None))
        if kind not in lean_classes:
            lean_classes[kind] = _lean_class(module)
        if (lean := lean_classes[kind]) is not None:
            module.__class__ = lean


def _lean_class(module: torch.nn.Module) -> type | None:
    """A subclass of the module's class that computes lean, if there is a way that gives the same."""
    weights = list(module.parameters())
    if not weights or any(hasattr(one, "ds_id") or not one.is_floating_point() for one in weights):
        return None
    for width_of, forward in ((_norm_width, _norm_forward), (_gated_width, _gated_forward)):
        width = width_of(module)
        if width is not None and _is_same(module, forward, width):
            return _subclass(type(module), forward)
    return None


def _subclass(cls: Any, lean: Forward) -> type:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.device.type == "cpu":
            return lean(self, x)
        plain: torch.Tensor = cls.forward(self, x)
        return plain

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "is_lean": True})


def _is_same(module: torch.nn.Module, forward: Forward, width: int) -> bool:
    weight = next(module.parameters())
    x = torch.randn(_ROWS, width, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        with torch.no_grad():
            return torch.equal(module.forward(x), forward(module, x))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # it wants to be called with something else


# --- RMSNorm ----------------------------------------------------------------------------------------------------------


def _norm_width(module: torch.nn.Module) -> int | None:
    """How long its rows are; None: it does not look like an RMSNorm."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, torch.nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    return len(weight) if len(list(module.parameters())) == 1 else None


def _norm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    norm: Any = _Norm.apply
    y: torch.Tensor = norm(x, self.weight, self.variance_epsilon)
    return y


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight * x / rms(x)`, and `1 / rms(x)` of each row in float32."""
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


class _Norm(torch.autograd.Function):
    """Keeps the input as it came and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, scale = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        dy = gradients[0]
        unit = x.to(torch.float32) * scale
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * unit.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dunit = (dy * weight).to(x.dtype).to(torch.float32)
            along = (dunit * unit).mean(-1, keepdim=True)
            dx = dunit.sub_(unit.mul_(along)).mul_(scale).to(x.dtype)
        return dx, dweight, None


# --- gated feed-forward layers ----------------------------------------------------------------------------------------


def _gated_width(module: torch.nn.Module) -> int | None:
    """How long its inputs are; None: it does not look like a gated layer."""
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(part) is torch.nn.Linear for part in parts) or not callable(getattr(module, "act_fn", None)):
        return None
    width: int = parts[0].in_features
    return width


def _gated_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    again = _Again(self.act_fn, gate, up)
    with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
        again.activated = self.act_fn(gate)
        again.product = again.activated * up
        y: torch.Tensor = self.down_proj(again.product)
    again.activated = again.product = None
    return y


class _Again:
    """Says of the tensors that autograd keeps which are made again when they are asked for."""

    def __init__(self, act: Any, gate: torch.Tensor, up: torch.Tensor) -> None:
        self._act, self._gate, self._up = act, gate.detach(), up.detach()
        self.activated: torch.Tensor | None = None
        self.product: torch.Tensor | None = None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | str:
        for name in ("activated", "product"):
            made = getattr(self, name)
            if made is not None and tensor.data_ptr() == made.data_ptr() and tensor.shape == made.shape:
                return name
        return tensor

    def unpack(self, kept: torch.Tensor | str) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad():
            activated: torch.Tensor = self._act(self._gate)
            return activated if kept == "activated" else activated * self._up
