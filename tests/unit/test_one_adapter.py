"""Our products for one adapter are what vLLM's own function gives, and vLLM's still copies."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayloom.rollout import one_adapter, vllm_cpu

lora_ops = pytest.importorskip("vllm.lora.ops.torch_ops.lora_ops")
TOKENS, RANK, IN, WIDTHS = 40, 8, 96, (64, 32, 32)
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def parts(dtype: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Inputs of three layers that are computed together, and their factors."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, IN, dtype=dtype)
    a = tuple(torch.randn(1, 1, RANK, IN, dtype=dtype) / IN**0.5 for _ in WIDTHS)
    return x, a, tuple(torch.randn(1, 1, width, RANK, dtype=dtype) for width in WIDTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_vllms_results(dtype: torch.dtype) -> None:
    x, a, b = parts(dtype)
    found = torch.randn(TOKENS, sum(WIDTHS), dtype=dtype)
    expected, indices, start = found.clone(), torch.zeros(TOKENS, dtype=torch.long), 0
    for of_a, of_b, width in zip(a, b, WIDTHS, strict=True):
        between = torch.zeros(TOKENS, RANK)
        lora_ops.bgmv_shrink(x, of_a, between, indices, 1.0)
        lora_ops.bgmv_expand_slice(between, of_b, expected, indices, start, width, True)
        start += width
    one_adapter.add_products(found, x, a, b)
    torch.testing.assert_close(found, expected, **CLOSE[dtype])


def test_the_next_adapter_is_written_where_the_products_read() -> None:
    x, a, b = parts(torch.float32)
    with torch.inference_mode():  # as vLLM computes
        one_adapter.add_products(torch.zeros(TOKENS, sum(WIDTHS)), x, a, b)
    torch.manual_seed(1)
    for factor in (*a, *b):
        factor[0] = 0  # as vLLM takes an adapter away
        factor[0, 0, :, :].copy_(torch.randn(factor.shape[2:]))
    expected = torch.cat([x @ of_a[0, 0].T @ of_b[0, 0].T for of_a, of_b in zip(a, b, strict=True)], dim=1)
    with torch.inference_mode():
        found = torch.zeros(TOKENS, sum(WIDTHS))
        one_adapter.add_products(found, x, a, b)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_an_output_layers_adapter() -> None:
    x, a, b = parts(torch.float32)
    calls: list[Any] = []
    chosen = vllm_cpu._logits_or_theirs(lambda *given, **options: calls.append(given))
    one, y = SimpleNamespace(no_lora=False), torch.randn(TOKENS, WIDTHS[0])
    expected, indices, between = y.clone(), torch.zeros(TOKENS, dtype=torch.long), torch.zeros(TOKENS, RANK)
    lora_ops.bgmv_shrink(x, a[0], between, indices, 1.0)
    lora_ops.bgmv_expand(between, b[0], expected, indices, add_inputs=True)
    before = y.clone()
    chosen(SimpleNamespace(no_lora=True), y, x, a[0], b[0], 1.0)
    chosen(one, y, x, torch.zeros_like(a[0]), b[0], 1.0)  # the adapter has nothing there
    assert torch.equal(y, before)
    padded = torch.cat([y, y[:, :3]], dim=1)
    chosen(one, y, x, a[0], b[0], 1.0)
    torch.testing.assert_close(y, expected, **CLOSE[torch.float32])
    chosen(one, padded, x, a[0], b[0], 1.0)  # a vocabulary that vLLM has rounded up
    torch.testing.assert_close(padded, torch.cat([expected, before[:, :3]], dim=1), **CLOSE[torch.float32])
    assert not calls
    chosen(one, y, x, torch.cat([a[0], a[0]]), b[0], 1.0)
    assert len(calls) == 1


def test_what_is_left_to_vllm() -> None:
    x, a, b = parts(torch.float32)
    y, calls = torch.zeros(TOKENS, sum(WIDTHS)), []
    chosen = vllm_cpu._linear_or_theirs(lambda *given, **options: calls.append(len(given[3])))
    one = SimpleNamespace(is_prefill=True, no_lora=False)
    chosen(one, y, x, a, b, 1.0, WIDTHS)
    assert not calls
    assert y.any()

    def both(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat([tensor, tensor]) for tensor in tensors)

    chosen(one, y, x, both(a), both(b), 1.0, WIDTHS)  # two adapters
    chosen(one, y, x, a, b, 1.0, WIDTHS, add_inputs=False)
    chosen(SimpleNamespace(is_prefill=False, no_lora=False), y, x, a, b, 1.0, WIDTHS)
    assert calls == [3, 3, 3]


def test_a_batch_of_the_base_stays_as_it_is() -> None:
    x, a, b = parts(torch.float32)
    y, calls = torch.zeros(TOKENS, sum(WIDTHS)), []
    chosen = vllm_cpu._linear_or_theirs(lambda *given, **options: calls.append(given))
    chosen(SimpleNamespace(is_prefill=True, no_lora=True), y, x, a, b, 1.0, WIDTHS)
    assert not calls
    assert not y.any()


@pytest.mark.parametrize("name", ["bgmv_shrink", "bgmv_expand_slice"])
def test_vllm_still_copies_the_factors_for_every_token(name: str) -> None:
    """Where this fails, `one_adapter` may be needed no more."""
    source = inspect.getsource(lora_ops)
    body = source[source.index(f"def {name}(") :]
    assert "lora_b_weights[lora_indices_tensor]" in body[: body.index("\ndef ", 1) if "\ndef " in body[1:] else None]


def test_vllm_still_has_the_functions_that_are_replaced() -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    first = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale"]
    for name, more in (("add_lora_linear", ["output_slices"]), ("add_lora_logits", [])):
        theirs: Any = getattr(PunicaWrapperCPU, name)
        if not getattr(theirs, "is_ours", False):  # an engine of this process may have been here
            assert list(inspect.signature(theirs).parameters) == [*first, *more, "buffer", "kwargs"]
