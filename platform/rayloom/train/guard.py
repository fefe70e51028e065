"""Steps that would spoil the weights: a loss or a gradient that is no number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

_NAMED = 32  # rows that a message names at most


class GradientGuard(transformers.TrainerCallback):
    """Looks at the gradients of every step before the optimizer uses them.

    All ranks see the same: gradients have been averaged by then. Not for DeepSpeed, which makes its steps itself.

    Args:
        on_bad: called where some are no numbers; unless it raises, no step is made with them.
    """

    def __init__(self, on_bad: Callable[[], None]) -> None:
        self._on_bad = on_bad

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        gradients = [
            weight.grad for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None
        ]
        if not gradients or all_finite(gradients):
            return
        self._on_bad()
        optimizer.zero_grad(set_to_none=True)  # without a gradient a weight is left as it is, its decay too


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether every element of every tensor is a number. One that is not makes the norm nan or infinite."""
    norms = torch._foreach_norm(tensors, float("inf"))
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def bad_step(step: int, what: str, rank: int, rows: Sequence[str], norm_before: tuple[int, float | None]) -> str:
    """Why the job ends before such a step has spoilt the weights, and where to look.

    Args:
        rows: of the rank's batches, by name.
        norm_before: the step that was logged last, and its gradient's norm.
    """
    logged, norm = norm_before
    before = f"the gradient's norm was {norm:.3g} at step {logged}" if norm is not None else "no step was logged yet"
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return (
        f"step {step}: {what} on rank {rank}, and no step was made with it; {before}. "
        f"The rows of this rank's batch (chunk:row): {', '.join(rows[:_NAMED])}{more}. "
        "Lower train.learning_rate, compute in bf16 or fp32, or look at these rows"
    )
