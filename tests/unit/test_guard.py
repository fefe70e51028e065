"""Gradients that are no numbers make no step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayloom.train.guard import GradientGuard, all_finite, bad_step


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


def test_the_rows_are_named():
    text = bad_step(8, "the loss is nan", 1, [f"rows 0:{number}" for number in range(40)], (7, 2.3456))
    assert text.startswith(
        "step 8: the loss is nan on rank 1, and no step was made with it; the gradient's norm was 2.35"
    )
    assert "rows 0:31 and 8 more. Lower train.learning_rate" in text
    assert "no step was logged yet. The rows" in bad_step(1, "the loss is nan", 0, ["rows 0:1"], (0, None))
