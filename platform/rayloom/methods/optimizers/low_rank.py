"""What GaLore and APOLLO share: an ordinary optimizer keeps the moments of projected gradients.

For each projected matrix the inner optimizer trains a stand-in of the low-rank shape. In a step the stand-in is set to
zero, gets the projected gradient, and holds the inner optimizer's direction afterwards (its rate is 1). The subclass
turns this into a direction for the whole matrix. So AdamW, 8-bit AdamW and Adafactor serve as they are, and all other
weights train by the same inner optimizer. Stand-ins have memory only during a step.

Every step decays weights first, as torch's AdamW: W <- (1 - lr * weight_decay) W + lr * direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayloom.methods.optimizers.projection import Projection
from rayloom.methods.optimizers.targets import Group, working_dtype

InnerFactory = Callable[[list[Group]], torch.optim.Optimizer]
"""Makes the inner optimizer for parameter groups that hold `lr` and `weight_decay`."""


@dataclass
class Matrix:
    """A projected weight and what is kept for it."""

    index: int
    """Number among the projected weights of the model; part of the seed of random projections."""
    weight: nn.Parameter
    stand_in: nn.Parameter
    step: int = 0
    projection: Projection | None = None
    norm: torch.Tensor | None = None
    """APOLLO: norm of the last step, which limits that of the next."""


class LowRank(torch.optim.Optimizer):
    """Base of optimizers on projected gradients.

    Args:
        plain: groups that train by the inner optimizer as they are.
        projected: groups of 2-D weights whose gradients are projected.
        first_index: `Matrix.index` of the first projected weight.
        update_proj_gap: steps between two projections.
    """

    def __init__(
        self,
        plain: list[Group],
        projected: list[Group],
        inner: InnerFactory,
        *,
        update_proj_gap: int,
        first_index: int = 0,
    ) -> None:
        self._gap = update_proj_gap
        self._matrices: list[Matrix] = []
        self._plain = len(plain)
        super().__init__([*plain, *projected], {})
        groups = [{name: value for name, value in group.items() if name != "lr_ratio"} for group in plain]
        for group in self.param_groups[self._plain :]:
            first = len(self._matrices)
            for weight in group["params"]:
                stand_in = nn.Parameter(torch.empty(0, dtype=working_dtype(weight), device=weight.device))
                self._matrices.append(Matrix(first_index + len(self._matrices), weight, stand_in))
            stand_ins = [matrix.stand_in for matrix in self._matrices[first:]]
            groups.append({"params": stand_ins, "lr": 1.0, "weight_decay": 0.0})
        self._inner = inner(groups)

    def project(self, matrix: Matrix, gradient: torch.Tensor) -> Projection:
        """A new projection for the gradient (m, n)."""
        raise NotImplementedError

    def direction(self, matrix: Matrix, gradient: torch.Tensor, low: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """What is added to the weight (m, n), but for the rate.

        Args:
            low: the projected gradient.
            moved: the inner optimizer's step for it at rate 1; already downhill.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One optimizer step. A weight without a gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups[: self._plain], self._inner.param_groups, strict=False):
            inner["lr"] = group["lr"]
        active = [matrix for matrix in self._matrices if matrix.weight.grad is not None]
        for matrix in active:
            gradient = matrix.weight.grad.to(matrix.stand_in.dtype)  # type: ignore[union-attr]
            if matrix.projection is None or matrix.step % self._gap == 0:
                matrix.projection = self.project(matrix, gradient)
            matrix.step += 1
            low = matrix.projection.down(gradient).contiguous()
            matrix.stand_in.data = torch.zeros_like(low)
            matrix.stand_in.grad = low
        self._inner.step()
        groups = {weight: group for group in self.param_groups[self._plain :] for weight in group["params"]}
        for matrix in active:
            weight, group = matrix.weight, groups[matrix.weight]
            projected = matrix.stand_in.grad
            assert weight.grad is not None
            assert projected is not None
            gradient = weight.grad.to(projected.dtype)
            direction = self.direction(matrix, gradient, projected, matrix.stand_in.data)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(direction.to(weight.dtype), alpha=group["lr"])
            matrix.stand_in.data = projected.new_empty(0)
            matrix.stand_in.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        matrices = [
            {
                "step": matrix.step,
                "left": matrix.projection and matrix.projection.left,
                "right": matrix.projection and matrix.projection.right,
                "norm": matrix.norm,
            }
            for matrix in self._matrices
        ]
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        return {"state": {"inner": self._inner.state_dict(), "matrices": matrices}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` of the same weights in the same groups."""
        self._inner.load_state_dict(state_dict["state"]["inner"])
        for matrix, saved in zip(self._matrices, state_dict["state"]["matrices"], strict=True):
            left, right, norm = (_on(saved[name], matrix.weight) for name in ("left", "right", "norm"))
            matrix.step, matrix.norm = saved["step"], norm
            matrix.projection = None if left is None and right is None else Projection(left, right)
        for group, values in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(values)


def _on(tensor: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(weight.device)
