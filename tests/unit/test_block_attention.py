"""Causal attention by blocks against the formula in float64."""

import pytest
import torch

from rayloom.models.block_attention import causal_attention


def _formula(query, key, value, scale):
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = scale * query @ key.transpose(1, 2)
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ value


def _inputs(heads, shared, length, size=16, value_size=16):
    generator = torch.Generator().manual_seed(length)
    shapes = ((heads, length, size), (shared, length, size), (shared, length, value_size))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _run(attend, inputs, scale=0.3):
    given = [one.detach().clone().requires_grad_() for one in inputs]
    out = attend(*given, scale)
    (out * torch.arange(out.numel()).double().sin().bfloat16().to(out.dtype).reshape(out.shape)).sum().backward()
    return [out.detach(), *(one.grad for one in given)]


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_values_and_gradients_are_the_formulas(length, heads):
    inputs = _inputs(*heads, length)
    for ours, exact in zip(_run(causal_attention, inputs), _run(_formula, inputs), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_values_of_another_size_than_keys():
    inputs = _inputs(4, 2, 140, value_size=24)
    for ours, exact in zip(_run(causal_attention, inputs), _run(_formula, inputs), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_in_bf16_it_is_as_near_to_float64_as_eager_attention_is():
    inputs = [one.bfloat16() for one in _inputs(6, 2, 200, 64, 64)]
    exact = _run(_formula, [one.double() for one in inputs], 0.125)
    for ours, eager, true in zip(
        _run(causal_attention, inputs, 0.125), _run(_formula, inputs, 0.125), exact, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours - true).norm() <= 1.1 * (eager - true).norm()
        assert (ours - true).norm() <= 0.01 * true.norm()
