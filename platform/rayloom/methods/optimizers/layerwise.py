"""Steps within the backward pass: each weight as soon as its gradient is whole, which is then freed.

So the gradients of two large matrices are never in memory together (Lv et al. 2023, https://arxiv.org/abs/2306.09782;
GaLore, section 4.3). Nothing that needs all gradients at once is left: no clipping to a global norm, no accumulation
over batches, no averaging over workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn


class LayerWise(torch.optim.Optimizer):
    """Many optimizers of one weight each; `step` has nothing left to do.

    The learning rate of a step must be set before its backward pass.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self.on_bad: Callable[[], None] | None = None
        """Called before a step with a gradient that is no number; unless it raises, the step is left out."""
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share_groups()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.register_post_accumulate_grad_hook(self._step_of(optimizer))

    def _step_of(self, optimizer: torch.optim.Optimizer) -> Any:
        def hook(weight: nn.Parameter) -> None:
            if self.on_bad is not None and not bool(torch.isfinite(cast(torch.Tensor, weight.grad)).all()):
                self.on_bad()
            else:
                optimizer.step()
            weight.grad = None

        return hook

    def _share_groups(self) -> None:
        self.param_groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> Any:
        """Every step is made in the backward pass."""
        return None if closure is None else closure()

    def state_dict(self) -> dict[str, Any]:
        """The states of the optimizers, in their order."""
        return {"state": [optimizer.state_dict() for optimizer in self._optimizers], "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` of the same weights."""
        for optimizer, state in zip(self._optimizers, state_dict["state"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()
