"""Adam-mini: fewer learning rates (Zhang et al. 2024, https://arxiv.org/abs/2406.16793): one second moment for a block.

For each block b of a weight, with gradient g: m <- beta1 m + (1 - beta1) g; v_b <- beta2 v_b + (1 - beta2) mean(g_b²);
w <- (1 - lr wd) w - lr m̂ / (sqrt(v̂_b) + eps). Half of AdamW's state.

Blocks as in the paper's Algorithm 3: the heads of queries and keys; the rows (output neurons, or tokens) of any other
matrix; a whole norm. Biases keep a second moment for each entry, as the authors have it. Of our own, since the
published package (adam-mini 1.1.1, 2024) finds its blocks by parts of names ("ln", "output", "linear") that also match
what they do not mean, and counts GPUs to guess the number of workers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rayloom.methods.optimizers.targets import Group, working_dtype

_QUERIES_AND_KEYS = {"q_proj", "k_proj", "query", "key", "wq", "wk"}


def block_count(name: str, weight: torch.Tensor, head_size: int | None) -> int:
    """How many blocks a weight has.

    Args:
        name: of the parameter, dotted.
        head_size: rows of a query's or key's head; None where the model does not say.
    """
    module, _, last = name.rpartition(".")
    if last == "bias":
        return weight.numel()
    if weight.ndim < 2:
        return 1
    if module.rpartition(".")[2] in _QUERIES_AND_KEYS and head_size and weight.shape[0] % head_size == 0:
        return weight.shape[0] // head_size
    return weight.shape[0]


class AdamMini(torch.optim.Optimizer):
    """Adam-mini.

    Args:
        groups: with `params`, `lr`, `weight_decay`.
        blocks: how many blocks each parameter has (`block_count`).
    """

    def __init__(
        self, groups: list[Group], blocks: dict[nn.Parameter, int], *, betas: tuple[float, float], eps: float
    ) -> None:
        self._blocks = blocks
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One optimizer step. A weight without a gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state, dtype = self.state[weight], working_dtype(weight)
                gradient = weight.grad.to(dtype).reshape(self._blocks[weight], -1)
                if not state:
                    state["step"] = 0
                    state["mean"] = torch.zeros_like(gradient)
                    state["mean_square"] = gradient.new_zeros(len(gradient), 1)
                state["step"] += 1
                state["mean"].lerp_(gradient, 1 - beta1)
                state["mean_square"].lerp_(gradient.square().mean(dim=1, keepdim=True), 1 - beta2)
                root = (state["mean_square"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                direction = (state["mean"] / root).view_as(weight).to(weight.dtype)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction, alpha=-group["lr"] / (1 - beta1 ** state["step"]))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`, its moments in the format in which they were saved."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, saved in state_dict["state"].items():
            state = self.state[weights[index]]
            for name in ("mean", "mean_square"):  # torch casts to the weight's format, which may be bf16
                state[name] = saved[name].to(weights[index].device, copy=True)
