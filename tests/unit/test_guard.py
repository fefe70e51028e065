"""Gradients that are no numbers make no step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayloom.train.guard import DroppedSteps, GradientGuard, all_finite, bad_step, gradient_guards


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


def test_the_rows_are_named():
    text = bad_step(8, "the loss is nan", 1, [f"rows 0:{number}" for number in range(40)], (7, 2.3456))
    assert text.startswith(
        "step 8: the loss is nan on rank 1, and no step was made with it; the gradient's norm was 2.35"
    )
    assert "rows 0:31 and 8 more. Lower train.learning_rate" in text
    assert "no step was logged yet. The rows" in bad_step(1, "the loss is nan", 0, ["rows 0:1"], (0, None))
