"""Steps that would spoil the weights: a loss that is no number or far too large, a gradient that is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers

from rayloom.errors import JobError
from rayloom.train.collective import of_all_ranks, over_ranks
from rayloom.train.meter import StreamMeter

_NAMED = 32  # rows that a message names at most
_MOST_DROPPED = 40  # steps on end in fp16: the loss's scale, which halves each time, is far below 1 by then
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
        step: how many steps have been made or left out.
        rows: of this rank's batches in the step, by name.
        describe: what a bad step is told as, from what is wrong with it, the rows, and whose they are.
        say: tells the user; of the first rank.
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
        rows: Callable[[], list[str]],
        describe: Callable[[str, Sequence[str], str], str],
        say: Callable[[str], None],
    ) -> None:
        self._max_loss, self._large_loss, self._stops = max_loss, large_loss, stops
        self._meter, self._rank, self._ranks, self._device = meter, rank, ranks, device
        self._step, self._rows, self._describe, self._say = step, rows, describe, say
        self._sum: torch.Tensor | float = 0.0  # of the step's batches so far
        self._own: str | None = None  # what is wrong with the loss of this rank
        self._large: str | None = None  # what is wrong with the mean loss, which all ranks know
        self._left_out = -1
        self._begins = True  # whether the next batch is a step's first

    @property
    def left_out_last(self) -> bool:
        """Whether the last step was left out."""
        return self._left_out == self._step() - 1

    def watch(self, loss: torch.Tensor, *, is_last: bool) -> torch.Tensor:
        """The loss; where its step shall not be made no number, so that its gradient is none either. What looks at
        gradients sees to the rest (`gradient_guards`).

        Args:
            loss: the batch's share of the step's mean, times the ranks.
            is_last: whether it is the step's last batch. All ranks have as many.

        Raises:
            JobError: the loss is bad, and such a step ends the job.
        """
        if self._begins:
            self._own = self._large = None
        self._begins = is_last
        if not torch.isfinite(loss.detach()):
            self._own = f"the loss is {float(loss)} on rank {self._rank}"
            if self._stops:  # the other ranks may not know, and are not asked
                raise JobError(self._describe(self._own, self._rows(), f"rank {self._rank}'s batch"))
        elif self._own is None and self._large is None and not self._has_limit:
            return loss
        if self._has_limit:
            self._sum = self._sum + loss.detach().double()
            self._large = self._too_large() if is_last else None
        if self._large is not None and self._stops:
            self.take_bad_gradients()
        return loss * torch.nan if self._own or self._large else loss

    def take_bad_gradients(self, *, only_known: bool = False) -> None:
        """Leave a step out whose gradients are no numbers, and tell why. Every rank calls it.

        Args:
            only_known: whether the gradients themselves are no reason.

        Raises:
            JobError: such a step ends the job.
        """
        told = of_all_ranks((self._own, self._rows()))
        large, self._own, self._large = self._large, None, None
        guilty = [one for one in told if one[0] is not None]
        fault = large or next((own for own, _ in guilty), None)
        if fault is None and only_known:
            return
        if fault is None:
            fault = "the loss is a number, but its gradient is not" if self._stops else "the gradient is not a number"
        rows = [name for _, of_rank in (guilty if not large and guilty else told) for name in of_rank]
        text = self._describe(fault, rows, "the step" if large or not guilty else "these ranks' batches")
        if self._stops:
            raise JobError(text)
        self._left_out = self._step()
        self._meter.skipped_steps += 1
        if self._rank == 0:
            self._say(text)

    @property
    def is_large(self) -> bool:
        """Whether the mean loss of the step that is computed is too large. The same on every rank."""
        return self._large is not None

    @property
    def _has_limit(self) -> bool:
        return self._max_loss is not None or self._large_loss is not None

    def _too_large(self) -> str | None:
        """Whether the mean loss of the step is. Every rank calls it."""
        mean = float(over_ranks(torch.as_tensor(self._sum).reshape(1), self._device)[0]) / self._ranks
        self._sum = 0.0
        limit = loss_limit(self._max_loss, self._meter.first_loss, self._large_loss)
        if self._meter.first_loss is None and math.isfinite(mean):
            self._meter.first_loss = mean
        if not mean > limit or not math.isfinite(mean):
            return None
        why = "train.max_loss" if self._max_loss is not None else f"by the first step's, {self._meter.first_loss:.3g}"
        return f"the loss is {mean:.4g}, and the most that it may be is {limit:.4g} ({why})"


class MadeSteps(transformers.TrainerCallback):
    """Takes what was measured of steps that were left out back from the sums of which means are logged.

    Args:
        left_out_last: whether the last step was left out.
        totals: sums since the last row of metrics, transformers' own of the losses among them.
    """

    def __init__(self, left_out_last: Callable[[], bool], totals: Callable[[], list[torch.Tensor]]) -> None:
        self._left_out_last, self._totals = left_out_last, totals
        self._before: list[torch.Tensor] = []
        self._steps = self._left_out = 0  # since the last row

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = [total.clone() for total in self._totals()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        if self._left_out_last():
            self._left_out += 1
            for total, before in zip(self._totals(), self._before, strict=True):
                total.copy_(before)

    def mean(self, over_all: float) -> float | None:
        """From the mean over all steps since the last row that over those that were made; None: none was."""
        steps, made = self._steps, self._steps - self._left_out
        self._steps = self._left_out = 0
        return over_all * steps / made if made else None


class GradientGuard(transformers.TrainerCallback):
    """Looks at the gradients of every step before the optimizer uses them.

    All ranks see the same: gradients have been averaged by then. Not for DeepSpeed, which makes its steps itself.

    Args:
        on_bad: called where some are no numbers; unless it raises, no step is made with them.
        is_known: whether no step is to be made, whatever they are: nothing of a loss that is no number comes to the
            weights where no token of the last batch is trained.
    """

    def __init__(self, on_bad: Callable[[], None], is_known: Callable[[], bool]) -> None:
        self._on_bad, self._is_known = on_bad, is_known

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        gradients = [
            weight.grad for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None
        ]
        if not gradients or (all_finite(gradients) and not self._is_known()):
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


class ScaledSteps(transformers.TrainerCallback):
    """The same for fp16, where gradients that are too large tell the loss's scale to go down, and no step is made.

    Args:
        was_dropped: whether the last step was.
        on_known: called where one was: its loss may have been bad.
        on_bad: called after so many on end that it is not the scale.
    """

    def __init__(
        self, was_dropped: Callable[[], bool], on_known: Callable[[], None], on_bad: Callable[[], None]
    ) -> None:
        self._was_dropped, self._on_known, self._on_bad = was_dropped, on_known, on_bad
        self._on_end = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_end = self._on_end + 1 if self._was_dropped() else 0
        if self._on_end >= _MOST_DROPPED:
            self._on_bad()
        elif self._on_end:
            self._on_known()


def gradient_guards(
    arguments: transformers.TrainingArguments, trainer: Any, guard: StepGuard
) -> list[transformers.TrainerCallback]:
    """What looks at the gradients of a training.

    Args:
        trainer: transformers', whose model may be DeepSpeed's, and whose accelerator knows what fp16 has dropped.
    """
    if arguments.deepspeed:
        if arguments.fp16:  # it gives up by itself where its scale cannot go down any more
            return []
        return [DroppedSteps(lambda: int(trainer.model_wrapped.skipped_steps), guard.take_bad_gradients)]
    if arguments.fp16:
        return [
            ScaledSteps(
                lambda: bool(trainer.accelerator.optimizer_step_was_skipped),
                partial(guard.take_bad_gradients, only_known=True),
                guard.take_bad_gradients,
            )
        ]
    return [GradientGuard(guard.take_bad_gradients, lambda: guard.is_large)]


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether every element of every tensor is a number. One that is not makes the norm nan or infinite."""
    norms = torch._foreach_norm(tensors, float("inf"))
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def bad_step(
    step: int, what: str, rows: Sequence[str], whose: str, norm_before: tuple[int, float | None], *, in_backward: bool
) -> str:
    """Why the job ends before such a step has spoilt the weights, and where to look.

    Args:
        rows: by name.
        whose: they are.
        norm_before: the step that was logged last, and its gradient's norm.
        in_backward: whether the optimizer steps within the backward pass, so that a part of the step has been made.
    """
    logged, norm = norm_before
    before = f"the gradient's norm was {norm:.3g} at step {logged}" if norm is not None else "no step was logged yet"
    made = "the step was broken off" if in_backward else "no step was made with it"
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return (
        f"step {step}: {what}, and {made}; {before}. "
        f"The rows of {whose} (chunk:row): {', '.join(rows[:_NAMED])}{more}. "
        "Lower train.learning_rate, compute in bf16 or fp32, or look at these rows"
    )
