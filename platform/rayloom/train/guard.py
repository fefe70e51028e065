"""Steps that would spoil the weights: a loss that is no number or far too large, a gradient that is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from rayloom.errors import JobError
from rayloom.train.collective import over_ranks
from rayloom.train.meter import StreamMeter

_NAMED = 32  # rows that a message names at most
_TIMES = 10  # the first step's loss: Megatron's factor for losses that are unexpectedly large


def loss_limit(given: float | None, first: float | None, least: float | None) -> float:
    """The mean loss above which a step is bad; infinite: none is.

    Args:
        given: `train.max_loss`, which has the last word.
        first: the mean loss of the training's first step, if that was made.
        least: `Stage.large_loss`, which no limit that follows from `first` falls below; None: none follows.
    """
    if given is not None:
        return given
    return math.inf if first is None or least is None else max(_TIMES * first, least)


class StepGuard:
    """Sees to it that no step is made which would spoil the weights.

    Args:
        max_loss: `train.max_loss`.
        large_loss: `Stage.large_loss`.
        stops: whether a bad step ends the job (`train.on_bad_step`).
        meter: counts the steps that were left out, and keeps the first step's loss, so that a resumed job has the same
            limit.
        step: how many steps have been made.
        describe: what a bad step is told as, from what is wrong with it.
        say: tells the user.
    """

    def __init__(
        self,
        max_loss: float | None,
        large_loss: float | None,
        *,
        stops: bool,
        meter: StreamMeter,
        rank: int,
        ranks: int,
        device: Any,
        step: Callable[[], int],
        describe: Callable[[str], str],
        say: Callable[[str], None],
    ) -> None:
        self._max_loss, self._large_loss, self._stops = max_loss, large_loss, stops
        self._meter, self._rank, self._ranks, self._device = meter, rank, ranks, device
        self._step, self._describe, self._say = step, describe, say
        self._sum: torch.Tensor | float = 0.0  # of the step's batches so far
        self._left_out = -1  # the step behind which the last one was left out

    def watch(self, loss: torch.Tensor, *, is_last: bool) -> torch.Tensor:
        """The loss, or, where its step shall not be made, no number: its gradient is none either, and
        `gradient_guards` see to the rest.

        Args:
            loss: the batch's share of the step's mean, times the ranks.
            is_last: whether it is the step's last batch on this rank.

        Raises:
            JobError: the loss is bad, and such a step ends the job.
        """
        fault = self._fault(loss.detach(), is_last)
        if fault is None:
            return loss
        self._take(fault)
        return loss * torch.nan

    def take_bad_gradients(self) -> None:
        """As `watch`, behind the backward pass."""
        bad = f"gradient is not a number on rank {self._rank}"
        self._take(f"the loss is a number, but its {bad}" if self._stops else f"the {bad}")

    def _take(self, fault: str) -> None:
        if self._stops:
            raise JobError(self._describe(fault))
        if self._left_out == self._step():
            return  # it has been counted and told
        self._left_out = self._step()
        self._meter.skipped_steps += 1
        self._say(self._describe(fault))

    def _fault(self, loss: torch.Tensor, is_last: bool) -> str | None:
        own = None if torch.isfinite(loss) else f"the loss is {float(loss)} on rank {self._rank}"
        if (own and self._stops) or (self._max_loss is None and self._large_loss is None):
            return own
        self._sum = self._sum + loss.double()
        if not is_last:
            return own
        mean = float(over_ranks(self._sum.reshape(1), self._device)[0]) / self._ranks  # every rank comes here
        self._sum = 0.0
        limit = loss_limit(self._max_loss, self._meter.first_loss, self._large_loss)
        if self._meter.first_loss is None and math.isfinite(mean):
            self._meter.first_loss = mean
        if own is not None or not mean > limit:
            return own
        why = "train.max_loss" if self._max_loss is not None else f"by the first step's, {self._meter.first_loss:.3g}"
        return f"the loss is {mean:.4g}, and the most that it may be is {limit:.4g} ({why})"


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


def bad_step(step: int, what: str, rows: Sequence[str], norm_before: tuple[int, float | None]) -> str:
    """Why the job ends before such a step has spoilt the weights, and where to look.

    Args:
        rows: of this rank's batches, by name.
        norm_before: the step that was logged last, and its gradient's norm.
    """
    logged, norm = norm_before
    before = f"the gradient's norm was {norm:.3g} at step {logged}" if norm is not None else "no step was logged yet"
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return (
        f"step {step}: {what}, and no step was made with it; {before}. "
        f"The rows of this rank's batch (chunk:row): {', '.join(rows[:_NAMED])}{more}. "
        "Lower train.learning_rate, compute in bf16 or fp32, or look at these rows"
    )
