"""Causal attention in 16 bits on CPU, a block of queries at a time, by matrix products.

PyTorch's own kernel for CPU multiplies small tiles, far below the rate of a large product in bf16
(tests/bench/NOTES.md). Here a block of queries meets all keys up to its last one in one product; heads that share their
keys (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245) are one matrix's rows. As in FlashAttention (Dao et al.
2022, https://arxiv.org/abs/2205.14135) no probabilities are kept: the backward pass makes a block's again.
"""

from __future__ import annotations

from typing import Any

import torch

_BLOCK = 128
"""Queries at a time. Half of a block's last square is thrown away, so a larger one wastes more."""


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """`softmax(scale * query key') value`, each query seeing the keys up to its own.

    Scores are rounded to the inputs' type, as in transformers' eager attention; the softmax is taken in float32.

    Args:
        query: (heads, length, size).
        key, value: (heads or a divisor of it, length, size).

    Returns:
        (heads, length, size).
    """
    attend: Any = _CausalAttention.apply
    attended: torch.Tensor = attend(query, key, value, scale)
    return attended


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        heads, length, _ = query.shape
        attended = query.new_empty(heads, length, value.shape[-1])
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            _, probabilities = _probabilities(query, key, start, end, scale)
            attended[:, start:end] = (probabilities @ value[:, :end]).view(heads, end - start, -1)
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        shared, length = key.shape[0], query.shape[1]
        dquery = torch.empty_like(query)
        wide = torch.promote_types(query.dtype, torch.float32)
        dkey, dvalue = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            scaled, probabilities = _probabilities(query, key, start, end, ctx.scale)
            dattended = gradients[0][:, start:end].reshape(shared, -1, value.shape[-1])
            dvalue[:, :end] += probabilities.transpose(1, 2) @ dattended
            dprobabilities = dattended @ value[:, :end].transpose(1, 2)
            dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, query.dtype)
            dkey[:, :end] += dscores.transpose(1, 2) @ scaled
            dquery[:, start:end] = (dscores @ key[:, :end]).mul_(ctx.scale).view(-1, end - start, query.shape[-1])
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype), None


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, start: int, end: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scaled queries from `start` to `end`, (key heads, heads a key head * queries, size), and what they give each
    key up to `end`."""
    shared, queries = key.shape[0], end - start
    scaled = (query[:, start:end] * scale).reshape(shared, -1, query.shape[-1])
    scores = scaled @ key[:, :end].transpose(1, 2)
    later = torch.ones(queries, queries, dtype=torch.bool, device=query.device).triu_(1)
    scores.view(shared, -1, queries, end)[..., start:].masked_fill_(later, -torch.inf)
    return scaled, scores.softmax(-1)
