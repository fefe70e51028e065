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


class DroppedSteps(transformers.TrainerCallback):
    """The same for DeepSpeed, which drops such a step by itself and goes on.

    Args:
        dropped: how many steps it has dropped.
        on_bad: called where it has dropped one, on every rank.
    """

    def __init__(self, dropped: Callable[[], int], on_bad: Callable[[], None]) -> None:
        self._dropped, self._on_bad = dropped, on_bad
        self._before = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = self._dropped()  # of a resumed run it is not 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._dropped() != self._before:
            self._on_bad()


def gradient_guards(
    arguments: transformers.TrainingArguments, engine: Callable[[], Any], on_bad: Callable[[], None]
) -> list[transformers.TrainerCallback]:
    """What looks at the gradients of a training. Nothing in fp16: there gradients that are too large are what tells the
    loss's scale to go down, and the step is dropped with it.

    Args:
        engine: the model as it is trained, DeepSpeed's where that is used.
        on_bad: as of `GradientGuard`.
    """
    if arguments.fp16:
        return []
    if arguments.deepspeed:
        return [DroppedSteps(lambda: int(engine().skipped_steps), on_bad)]
    return [GradientGuard(on_bad)]


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
