"""Losses that explode, and gradients that are no numbers, make no step."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayloom.errors import JobError
from rayloom.train.guard import (
    DroppedSteps,
    GradientGuard,
    MadeSteps,
    ScaledSteps,
    StepGuard,
    all_finite,
    bad_step,
    gradient_guards,
    loss_limit,
)
from rayloom.train.meter import StreamMeter


@given(st.lists(st.floats(width=32), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_element_counts(values, dtype):
    tensors = [torch.tensor([value, 1.0], dtype=torch.float32).to(dtype) for value in values]
    assert all_finite(tensors) == all(bool(tensor.isfinite().all()) for tensor in tensors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_step_is_made(bad):
    weight, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([weight, other], lr=0.1, weight_decay=0.1)
    met: list[int] = []
    guard = GradientGuard(lambda: met.append(1), lambda: False)
    for gradient in (1.0, bad):
        weight.grad, other.grad = torch.full((2,), gradient), torch.ones(2)
        guard.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        before = weight.detach().clone()
        optimizer.step()
        assert torch.equal(weight, before) == (gradient != 1.0)  # nor does it decay
    assert met == [1]
    assert optimizer.state[other]["step"] == 1


def test_a_step_that_is_known_to_be_bad_is_not_made_whatever_its_gradient():
    """The last batch of a step may have no trained token, and no gradient that its loss could spoil."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    met: list[int] = []
    weight.grad = torch.ones(2)
    GradientGuard(lambda: met.append(1), lambda: True).on_pre_optimizer_step(None, None, None, optimizer=optimizer)
    assert (met, weight.grad) == ([1], None)


def test_what_looks_at_the_gradients():
    met: list[str] = []

    def take(only_known: bool = False) -> None:
        met.append("known" if only_known else "bad")

    trainer: Any = SimpleNamespace(
        model_wrapped=SimpleNamespace(skipped_steps=3), accelerator=SimpleNamespace(optimizer_step_was_skipped=False)
    )

    def guards(**arguments: Any) -> list[Any]:
        given: Any = SimpleNamespace(**{"fp16": False, "deepspeed": None, **arguments})
        return gradient_guards(given, trainer, cast(Any, SimpleNamespace(take_bad_gradients=take, is_large=False)))

    assert guards(fp16=True, deepspeed={"zero_optimization": {"stage": 2}}) == []
    assert [type(guard) for guard in guards()] == [GradientGuard]
    (guard,) = guards(deepspeed={"zero_optimization": {"stage": 2}})
    assert type(guard) is DroppedSteps
    for dropped in (3, 4, 4):
        guard.on_step_begin(None, None, None)
        trainer.model_wrapped.skipped_steps = dropped
        guard.on_optimizer_step(None, None, None)
    assert met == ["bad"]  # those of before a resume are not news
    met.clear()
    (guard,) = guards(fp16=True)
    assert type(guard) is ScaledSteps
    for is_dropped in (False, True, False, *[True] * 40):
        trainer.accelerator.optimizer_step_was_skipped = is_dropped
        guard.on_optimizer_step(None, None, None)
    assert met == ["known"] * 40 + ["bad"]  # a scale that goes down now and then is as it should be


def test_steps_that_were_left_out_are_not_in_the_mean():
    total, measured, left_out = torch.tensor(0.0), torch.zeros(2), [False]
    made = MadeSteps(lambda: left_out[0], lambda: [total, measured])
    for losses, is_left_out in (((1.0, 2.0), False), ((4.0, torch.nan), True), ((0.5, 0.5), False)):
        made.on_step_begin(None, None, None)
        for loss in losses:
            total += loss
            measured += torch.tensor([1.0, loss])
        left_out[0] = is_left_out
        made.on_step_end(None, None, None)
    assert made.mean(float(total) / 3) == 2.0  # transformers divides by all three
    assert measured.tolist() == [4.0, 4.0]
    total.zero_()
    made.on_step_begin(None, None, None)
    total += torch.inf
    left_out[0] = True
    made.on_step_end(None, None, None)
    assert float(total) == 0.0
    assert made.mean(float(total) / 1) is None


@pytest.mark.parametrize(
    ("given", "first", "least", "limit"),
    [
        (None, 0.5, 10.0, 10.0),
        (None, 2.5, 10.0, 25.0),
        (None, -3.0, 100.0, 100.0),
        (None, None, 10.0, math.inf),  # no step was made yet
        (None, 2.5, None, math.inf),
        (3.0, 2.5, 10.0, 3.0),
        (3.0, None, None, 3.0),
    ],
)
def test_how_large_a_loss_may_be(given: float | None, first: float | None, least: float | None, limit: float) -> None:
    assert loss_limit(given, first, least) == limit


def guard_of(
    said: list[str], meter: StreamMeter, step: int = 0, *, max_loss: float | None = None, stops: bool = False
) -> StepGuard:
    return StepGuard(
        max_loss,
        10.0,
        stops=stops,
        meter=meter,
        rank=0,
        ranks=1,
        device="cpu",
        step=lambda: step,
        rows=lambda: ["rows 0:7"],
        describe=lambda what, rows, whose: f"step {step}: {what}; {whose}: {' '.join(rows)}",
        say=said.append,
    )


def test_the_mean_of_a_step_counts_not_that_of_a_batch() -> None:
    said: list[str] = []
    meter = StreamMeter.start(1)
    guard = guard_of(said, meter)

    def step(*shares: float) -> list[float]:
        last = len(shares) - 1
        return [float(guard.watch(torch.tensor(share), is_last=n == last)) for n, share in enumerate(shares)]

    assert step(1.5, 0.75) == [1.5, 0.75]
    assert meter.first_loss == 2.25
    assert step(22.0, 0.5) == [22.0, 0.5]  # 22.5 is the most
    assert step(0.5, 22.0) == [0.5, 22.0]
    kept, dropped = step(0.75, 22.0)
    assert (kept, math.isnan(dropped)) == (0.75, True)
    guard.take_bad_gradients()  # of which there is none now
    what = "the loss is 22.75, and the most that it may be is 22.5 (by the first step's, 2.25)"
    assert said == [f"step 0: {what}; the step: rows 0:7"]
    assert (meter.skipped_steps, meter.first_loss) == (1, 2.25)
    assert step(2.0, 2.0) == [2.0, 2.0]  # it is over


def test_a_resumed_job_has_the_same_limit(tmp_path: Any) -> None:
    meter = StreamMeter.start(1)
    guard_of([], meter).watch(torch.tensor(2.0), is_last=True)
    meter.save(tmp_path, 1)
    loaded, _ = StreamMeter.load(tmp_path)
    guard = guard_of([], loaded, stops=True)
    guard.watch(torch.tensor(20.0), is_last=True)
    with pytest.raises(JobError, match=r"step 0: the loss is 20.1, and the most that it may be is 20 "):
        guard.watch(torch.tensor(20.1), is_last=True)


def test_what_the_job_says_goes_before_what_follows() -> None:
    guard = guard_of([], StreamMeter.start(1), max_loss=3.0, stops=True)
    with pytest.raises(JobError, match=r"the loss is 3.5, and the most that it may be is 3 \(train.max_loss\)"):
        guard.watch(torch.tensor(3.5), is_last=True)  # the first step, too


def test_a_loss_that_is_no_number() -> None:
    with pytest.raises(JobError, match="the loss is nan on rank 0; rank 0's batch: rows 0:7"):
        guard_of([], StreamMeter.start(1), stops=True).watch(torch.tensor(math.nan), is_last=False)
    said: list[str] = []
    meter = StreamMeter.start(1)
    guard = guard_of(said, meter)
    for loss, is_last in ((math.inf, False), (2.0, False), (math.nan, True)):
        assert math.isnan(float(guard.watch(torch.tensor(loss), is_last=is_last)))
    guard.take_bad_gradients(only_known=True)
    assert said == ["step 0: the loss is nan on rank 0; these ranks' batches: rows 0:7"]
    assert (meter.skipped_steps, meter.first_loss) == (1, None)
    assert float(guard.watch(torch.tensor(2.0), is_last=True)) == 2.0
    guard.take_bad_gradients(only_known=True)  # the scale of fp16 has gone down
    assert meter.skipped_steps == 1


def test_a_gradient_that_is_no_number() -> None:
    with pytest.raises(JobError, match="the loss is a number, but its gradient is not; the step: rows 0:7"):
        guard_of([], StreamMeter.start(1), stops=True).take_bad_gradients()
    said: list[str] = []
    meter = StreamMeter.start(1)
    for step in (3, 4):
        guard_of(said, meter, step).take_bad_gradients()
    assert said == [f"step {step}: the gradient is not a number; the step: rows 0:7" for step in (3, 4)]
    assert meter.skipped_steps == 2


def test_whether_the_last_step_was_left_out() -> None:
    steps = [5]
    guard = guard_of([], StreamMeter.start(1))
    guard._step = lambda: steps[0]
    assert not guard.left_out_last
    guard.take_bad_gradients()
    steps[0] = 6
    assert guard.left_out_last
    steps[0] = 7
    assert not guard.left_out_last


def test_the_rows_are_named():
    names = [f"rows 0:{number}" for number in range(40)]
    text = bad_step(8, "the loss is nan on rank 1", names, "the step", (7, 2.3456), in_backward=False)
    assert text.startswith(
        "step 8: the loss is nan on rank 1, and no step was made with it; the gradient's norm was 2.35"
    )
    assert "rows 0:31 and 8 more. Lower train.learning_rate" in text
    first = bad_step(1, "the loss is nan", ["rows 0:1"], "the step", (0, None), in_backward=True)
    assert "and the step was broken off; no step was logged yet. The rows of the step (chunk:row): rows 0:1." in first
