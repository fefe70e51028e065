"""Products of large bf16 matrices, computed in float32 on processors that are faster at it.

Some processors multiply bf16 at half the rate of float32, though they have instructions for it: Intel's without AMX,
also where a virtual machine hides it (tests/bench/NOTES.md). Every bf16 number is a float32 number, and both ways add
up in float32 and round the sum to bf16, so what comes out differs by the order of the sums only. A weight is converted
some rows at a time, while they are in the cache; no weight is kept in float32.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

_LEAST_ROWS = 64
"""Of the input: with fewer, converting the weight takes longer than the faster product saves."""
_ROWS, _TILE = 1024, 2**21
"""About as many rows of the input, and numbers of the weight, are converted at a time."""


def is_wide(x: torch.Tensor) -> bool:
    """Whether to compute the products of x (..., in) in float32."""
    big_enough = x.numel() >= _LEAST_ROWS * x.shape[-1]
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and big_enough and float32_is_faster()


@lru_cache(maxsize=1)
def float32_is_faster() -> bool:
    """Whether this processor multiplies bf16 matrices faster in float32, both conversions included.

    It is told from what the processor is, and not measured: beside other work a measure comes out otherwise now and
    then, and a run that goes on would not add up as it did before.
    """
    features = torch.cpu.get_capabilities()
    if features.get("architecture") != "x86_64" or features.get("amx_bf16"):
        return False
    # Intel's instruction has half of float32's rate (a virtual machine may hide AMX), AMD's twice; others emulate it.
    return "intel" in str(features.get("cpu_name")).lower() or not features.get("avx512_bf16")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x weight' + bias`, computed in float32; not for autograd, nor within autocast.

    Args:
        x: (rows, in).
        weight: (out, in).

    Returns:
        (rows, out), in x's type.
    """
    y = x.new_empty(len(x), len(weight))
    for some, to in _parts(x, y):
        inputs = _SPACE.wide("inputs", some)
        for tile in _tiles(weight):
            outputs = _SPACE.floats("outputs", len(some), tile.stop - tile.start)
            torch.mm(inputs, _SPACE.wide("tile", weight[tile]).T, out=outputs)
            to[:, tile] = outputs if bias is None else outputs.add_(bias[tile])
    return y


def into_input(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`dy weight`, computed in float32: what a linear layer hands back; not for autograd, nor within autocast.

    Args:
        dy: (rows, out).
        weight: (out, in).

    Returns:
        (rows, in), in dy's type.
    """
    dx = dy.new_empty(len(dy), weight.shape[1])
    for some, to in _parts(dy, dx):
        outputs = _SPACE.floats("outputs", *to.shape).zero_()
        for tile in _tiles(weight):
            outputs.addmm_(_SPACE.wide("inputs", some[:, tile]), _SPACE.wide("tile", weight[tile]))
        to.copy_(outputs)
    return dx


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x weight' + bias + scaling (x down') up'`, rounded once; as `linear` else.

    Args:
        down: (rank, in).
        up: (out, rank).

    Returns:
        (rows, out) in x's type, and x down', (rows, rank) in float32.
    """
    size, rank = weight.shape[1], len(down)
    y, small = x.new_empty(len(x), len(weight)), x.new_empty(len(x), rank, dtype=torch.float32)
    down = down.float()
    for some, to, of_small in _parts(x, y, small):
        # The small product has a few more columns in both matrices: no pass of its own goes over the large one.
        inputs = _SPACE.floats("inputs", len(some), size + rank)
        inputs[:, :size] = some
        torch.mm(inputs[:, :size], down.T, out=of_small)
        torch.mul(of_small, scaling, out=inputs[:, size:])
        for tile in _tiles(weight):
            rows = _SPACE.floats("tile", tile.stop - tile.start, size + rank)
            rows[:, :size], rows[:, size:] = weight[tile], up[tile]
            outputs = _SPACE.floats("outputs", len(some), len(rows))
            torch.mm(inputs, rows.T, out=outputs)
            to[:, tile] = outputs if bias is None else outputs.add_(bias[tile])
    return y, small


def adapted_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    small: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `adapted_linear` hands back, of a gradient dy (rows, out): that by x (rows, in) in its type, by down and by
    up in float32."""
    down, up = down.float(), up.float()
    dx, ddown, dup = torch.empty_like(x), torch.zeros_like(down), torch.zeros_like(up)
    for some, to, of_x, of_small in _parts(dy, dx, x, small):
        outputs, dsmall = _SPACE.floats("outputs", *to.shape).zero_(), torch.zeros_like(of_small)
        for tile in _tiles(weight):
            given = _SPACE.wide("inputs", some[:, tile])
            outputs.addmm_(given, _SPACE.wide("tile", weight[tile]))
            dsmall.addmm_(given, up[tile], alpha=scaling)
            dup[tile].addmm_(given.T, of_small, alpha=scaling)
        to.copy_(outputs.addmm_(dsmall, down))
        ddown.addmm_(dsmall.T, _SPACE.wide("inputs", of_x))
    return dx, ddown, dup


def _parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of all, in equal parts: a small rest would have the whole weight converted for itself."""
    count = max(1, round(len(tensors[0]) / _ROWS))
    return zip(*(one.tensor_split(count) for one in tensors), strict=True)


def _tiles(weight: torch.Tensor) -> list[slice]:
    size = max(1, _TILE // weight.shape[1])
    return [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]


class _Space(threading.local):
    """A thread's memory for what stands in float32 for a moment: taken anew each time, it would tear holes into the
    memory that activations are kept in."""

    def __init__(self) -> None:
        self._of: dict[str, torch.Tensor] = {}

    def floats(self, name: str, *shape: int) -> torch.Tensor:
        """Of this shape, with anything in it; until the next call with this name."""
        need = math.prod(shape)
        if name not in self._of or self._of[name].numel() < need:
            self._of.pop(name, None)
            self._of[name] = torch.empty(need)
        return self._of[name][:need].view(shape)

    def wide(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in float32."""
        return self.floats(name, *tensor.shape).copy_(tensor)


_SPACE = _Space()


class FrozenLinear(torch.nn.Linear):
    """A linear layer that computes its frozen weight's products in float32, and those of a trained one as ever."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if trains or hasattr(self.weight, "ds_id") or self.weight.dtype != dtype or not is_wide(x := x.to(dtype)):
            return super().forward(x)
        product: Any = _FrozenProduct.apply
        y: torch.Tensor = product(x.flatten(0, -2), self.weight, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


class _FrozenProduct(torch.autograd.Function):
    """Of rows: a model may write into what a layer returns, and autograd refuses that for views made in here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        with torch.autocast("cpu", enabled=False):
            return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        (dy,) = gradients
        return into_input(dy, weight), None, None


def use_wide_products(model: torch.nn.Module) -> None:
    """Let every plain linear layer in bf16 be a `FrozenLinear`, if this processor is faster so."""
    layers = [one for one in model.modules() if type(one) is torch.nn.Linear and one.weight.dtype == torch.bfloat16]
    if layers and float32_is_faster():
        for layer in layers:
            layer.__class__ = FrozenLinear
