"""Causal attention by blocks against the formula in float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rayloom.models.block_attention import causal_attention


def _formula(query, key, value, scale, sizes):
    groups = query.shape[1] // key.shape[1]
    query, key, value = (one.transpose(0, 1) for one in (query, key, value))
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = scale * query @ key.transpose(1, 2)
    number, seen = 0, torch.zeros(scores.shape[1:], dtype=torch.bool)
    for size, is_example in sizes:
        part = slice(number, number + size)
        seen[part, part] = torch.ones(size, size, dtype=torch.bool).tril() & is_example
        number += size
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)  # padding sees nothing
    return (probabilities @ value).transpose(0, 1)


def _inputs(heads, shared, length, size=16, value_size=16):
    generator = torch.Generator().manual_seed(length)
    shapes = ((length, heads, size), (length, shared, size), (length, shared, value_size))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _run(attend, inputs, sizes, scale=0.3):
    given = [one.detach().clone().requires_grad_() for one in inputs]
    out = attend(*given, scale, sizes)
    (out * torch.arange(out.numel()).double().sin().bfloat16().to(out.dtype).reshape(out.shape)).sum().backward()
    return [out.detach(), *(one.grad for one in given)]


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_values_and_gradients_are_the_formulas(length, heads):
    inputs, sizes = _inputs(*heads, length), ((length, True),)
    for ours, exact in zip(_run(causal_attention, inputs, sizes), _run(_formula, inputs, sizes), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=40)
@example(sizes=[(5, False)], groups=2, shared=1)  # a batch that fills a step up trains nothing
@given(
    sizes=st.lists(st.tuples(st.integers(1, 150), st.booleans()), min_size=1, max_size=6),
    groups=st.integers(1, 3),
    shared=st.integers(1, 2),
)
def test_examples_of_any_lengths_with_padding_between_them(sizes, groups, shared):
    sizes = tuple(sizes)
    inputs = _inputs(groups * shared, shared, sum(size for size, _ in sizes), 4, 6)
    for ours, exact in zip(_run(causal_attention, inputs, sizes), _run(_formula, inputs, sizes), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def test_in_bf16_it_is_as_near_to_float64_as_eager_attention_is():
    inputs, sizes = [one.bfloat16() for one in _inputs(6, 2, 200, 64, 64)], ((80, True), (120, True))
    exact = _run(_formula, [one.double() for one in inputs], sizes, 0.125)
    for ours, eager, true in zip(
        _run(causal_attention, inputs, sizes, 0.125), _run(_formula, inputs, sizes, 0.125), exact, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours - true).norm() <= 1.1 * (eager - true).norm()
        assert (ours - true).norm() <= 0.01 * true.norm()
