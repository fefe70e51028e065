"""Losses that explode, and gradients that are no numbers, make no step."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayloom.errors import JobError
from rayloom.train.guard import (
    DroppedSteps,
    GradientGuard,
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
    guard = GradientGuard(lambda: met.append(1))
    for gradient in (1.0, bad):
        weight.grad, other.grad = torch.full((2,), gradient), torch.ones(2)
        guard.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        before = weight.detach().clone()
        optimizer.step()
        assert torch.equal(weight, before) == (gradient != 1.0)  # nor does it decay
    assert met == [1]
    assert optimizer.state[other]["step"] == 1


def test_what_looks_at_the_gradients():
    engine, met = SimpleNamespace(skipped_steps=3), []

    def guards(**arguments: Any) -> list[Any]:
        given: Any = SimpleNamespace(**{"fp16": False, "deepspeed": None, **arguments})
        return gradient_guards(given, lambda: engine, lambda: met.append(1))

    assert guards(fp16=True) == guards(fp16=True, deepspeed={"zero_optimization": {"stage": 2}}) == []
    assert [type(guard) for guard in guards()] == [GradientGuard]
    (guard,) = guards(deepspeed={"zero_optimization": {"stage": 2}})
    assert type(guard) is DroppedSteps
    for dropped in (3, 4, 4):
        guard.on_step_begin(None, None, None)
        engine.skipped_steps = dropped
        guard.on_optimizer_step(None, None, None)
    assert met == [1]  # those of before a resume are not news


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
        describe=lambda what: f"step {step}: {what}",
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
    assert said == ["step 0: the loss is 22.75, and the most that it may be is 22.5 (by the first step's, 2.25)"]
    assert (meter.skipped_steps, meter.first_loss) == (1, 2.25)


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
    with pytest.raises(JobError, match="the loss is nan on rank 0"):
        guard_of([], StreamMeter.start(1), stops=True).watch(torch.tensor(math.nan), is_last=False)
    said: list[str] = []
    meter = StreamMeter.start(1)
    guard = guard_of(said, meter)
    for loss, is_last in ((math.inf, False), (math.nan, True)):
        assert math.isnan(float(guard.watch(torch.tensor(loss), is_last=is_last)))
    guard.take_bad_gradients()
    assert said == ["step 0: the loss is inf on rank 0"]  # one step, told once
    assert (meter.skipped_steps, meter.first_loss) == (1, None)


def test_a_gradient_that_is_no_number() -> None:
    with pytest.raises(JobError, match="the loss is a number, but its gradient is not a number on rank 0"):
        guard_of([], StreamMeter.start(1), stops=True).take_bad_gradients()
    said: list[str] = []
    meter = StreamMeter.start(1)
    for step in (3, 4):
        guard_of(said, meter, step).take_bad_gradients()
    assert said == ["step 3: the gradient is not a number on rank 0", "step 4: the gradient is not a number on rank 0"]
    assert meter.skipped_steps == 2


def test_the_rows_are_named():
    text = bad_step(8, "the loss is nan on rank 1", [f"rows 0:{number}" for number in range(40)], (7, 2.3456))
    assert text.startswith(
        "step 8: the loss is nan on rank 1, and no step was made with it; the gradient's norm was 2.35"
    )
    assert "rows 0:31 and 8 more. Lower train.learning_rate" in text
    assert "no step was logged yet. The rows" in bad_step(1, "the loss is nan", ["rows 0:1"], (0, None))
