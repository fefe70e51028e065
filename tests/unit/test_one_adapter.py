"""Our products for one adapter are what vLLM's own functions give, and vLLM's still copy."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from rayloom.rollout import one_adapter

lora_ops = pytest.importorskip("vllm.lora.ops.torch_ops.lora_ops")
TOKENS, RANK, WIDTH = 40, 8, 96


def theirs(name: str) -> Any:
    """vLLM's own function, also where an engine of this process has replaced it."""
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(inspect.getsource(lora_ops), lora_ops.__file__, "exec"), namespace)
    return namespace[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [True, False])
def test_they_are_vllms_results(dtype: torch.dtype, add: bool) -> None:
    torch.manual_seed(0)
    indices = torch.zeros(TOKENS, dtype=torch.long)
    inputs, a = torch.randn(TOKENS, WIDTH, dtype=dtype), torch.randn(1, 1, RANK, WIDTH, dtype=dtype)
    b = torch.randn(1, 1, 64, RANK, dtype=dtype)
    found, expected = (torch.zeros(TOKENS, RANK) for _ in range(2))
    one_adapter._shrink(inputs, a, found, indices, 0.5)
    theirs("bgmv_shrink")(inputs, a, expected, indices, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    start = torch.randn(TOKENS, 160, dtype=dtype)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for name, ours, more in (
        ("bgmv_expand", one_adapter._expand, ()),
        ("bgmv_expand_slice", one_adapter._expand_slice, (32, 64)),
    ):
        one, other = start.clone(), start.clone()
        ours(found, b, one, indices, *more, add)
        theirs(name)(found, b, other, indices, *more, add)
        torch.testing.assert_close(one, other, **close)


def test_several_adapters_are_left_to_vllm() -> None:
    calls: list[str] = []
    chosen = one_adapter._or_theirs(lambda *a, **k: calls.append("ours"), lambda *a, **k: calls.append("vllm"))
    chosen(torch.zeros(1, 4), torch.zeros(1, 1, 2, 4))
    chosen(torch.zeros(1, 4), torch.zeros(2, 1, 2, 4))
    assert calls == ["ours", "vllm"]


@pytest.mark.parametrize("name", ["bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"])
def test_vllm_still_copies_the_factors_for_every_token(name: str) -> None:
    """Where this fails, `one_adapter` may be needed no more."""
    source = inspect.getsource(lora_ops)
    body = source[source.index(f"def {name}(") :]
    assert "lora_b_weights[lora_indices_tensor]" in body[: body.index("\ndef ", 1) if "\ndef " in body[1:] else None]
