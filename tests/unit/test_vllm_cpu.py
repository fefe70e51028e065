"""vLLM's compiled norms and the gated layer, as engines on CPU take them, against their formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayloom.rollout import vllm_cpu

pytest.importorskip("vllm._C")
EPSILON = 1e-5
TYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Root mean square layer normalization, arXiv 1910.07467, equation 4."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [16, 48, 576])
def test_norms(width: int, dtype: torch.dtype) -> None:
    x, residual = (3 * numbers(17, width, dtype=dtype), numbers(17, width, dtype=dtype).flip(0))
    weight = 1 + numbers(width, dtype=dtype)
    close: Any = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(vllm_cpu._norm(x, weight, EPSILON).double(), formula(x, weight), **close)
    total = x.double() + residual.double()
    normed, summed = vllm_cpu._norm_of_sum(x.clone(), residual.clone(), weight, EPSILON)
    torch.testing.assert_close(summed.double(), total, **close)
    torch.testing.assert_close(normed.double(), formula(total, weight), **close)


def test_norms_that_are_left_to_vllm() -> None:
    x, weight = numbers(4, 16, dtype=torch.float32), numbers(16, dtype=torch.float32)
    assert vllm_cpu._norm_fits(x, weight, EPSILON)
    assert not vllm_cpu._norm_fits(x, None, EPSILON)
    assert not vllm_cpu._norm_fits(x, weight.bfloat16(), EPSILON)
    assert not vllm_cpu._norm_fits(x, weight, EPSILON, 4)
    assert not vllm_cpu._norm_fits(numbers(4, 20, dtype=torch.float32), numbers(20, dtype=torch.float32), EPSILON)
    assert not vllm_cpu._norm_fits(numbers(16, 4, dtype=torch.float32).T, weight, EPSILON)
    assert vllm_cpu._norm_of_sum_fits(x, x, weight, EPSILON)
    assert not vllm_cpu._norm_of_sum_fits(x, x.bfloat16(), weight, EPSILON)
    assert not vllm_cpu._norm_of_sum_fits(x, numbers(16, 4, dtype=torch.float32).T, weight, EPSILON)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_gated_layer_is_what_vllm_computes(dtype: torch.dtype) -> None:
    activation = pytest.importorskip("vllm.model_executor.layers.activation")
    x = numbers(17, 96, dtype=dtype)
    before = x.clone()
    assert torch.equal(vllm_cpu.gated(x), activation.SiluAndMul.forward_native(x))
    assert torch.equal(x, before)
