"""Causal attention of examples of many lengths in 16 bits on CPU, a block of queries at a time, by matrix products.

PyTorch's own kernel for CPU multiplies small tiles, far below the rate of a large product in bf16
(tests/bench/NOTES.md). Here a block of queries meets all keys up to its last one in one product; heads that share their
keys (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245) are one matrix's rows, and examples of nearly the same
length are one batch of matrices. As in FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135) no
probabilities are kept: the backward pass makes a block's again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from rayloom.models.wide_products import is_wide

_BLOCK = 128
"""Queries at a time. Half of a block's last square is thrown away, so a larger one wastes more."""
_UNIT = 32
"""Lengths are rounded up to a multiple of this; examples of one such length are computed together."""

Sizes = tuple[tuple[int, bool], ...]
"""Of consecutive tokens: how many, and whether they are an example, or padding."""


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sizes: Sizes
) -> torch.Tensor:
    """`softmax(scale * query key') value`, each query seeing the keys of its example up to its own.

    Scores are rounded to the inputs' type, as in transformers' eager attention; the softmax is taken in float32. Where
    the processor is faster in float32 (`rayloom.models.wide_products`), only inputs and outputs are rounded.

    Args:
        query: (tokens, heads, size).
        key, value: (tokens, heads or a divisor of it, size).
        sizes: of the examples, in order, with the padding between them.

    Returns:
        (tokens, heads, size). What padding sees is 0.
    """
    attend: Any = _CausalAttention.apply
    attended: torch.Tensor = attend(query, key, value, scale, _layout(sizes, query.shape[1], key.shape[1]))
    return attended.view(*query.shape[:2], value.shape[-1])


@dataclass(frozen=True)
class _Block:
    """Some queries of some examples, and the keys that they see."""

    rows: slice
    """Of the queries' matrices."""
    keys: slice
    """Of the keys' matrices; as many as the examples have."""
    matrices: int
    """Examples times heads of keys."""
    length: int
    """Keys of an example, those that are there to round its length up among them."""
    start: int
    end: int
    """The first query, and the one behind the last one, in the example."""


@dataclass(frozen=True)
class _Layout:
    """How the tokens' rows stand in the matrices that are multiplied.

    Indices into (tokens * heads) rows and back; a row that is behind all others is 0.
    """

    blocks: list[_Block]
    queries: torch.Tensor
    from_queries: torch.Tensor
    keys: torch.Tensor
    from_keys: torch.Tensor
    rounding: torch.Tensor
    """Rows of the queries' matrices that are there to round a length up; they repeat an example's last token."""
    later: torch.Tensor
    """(queries, keys) of a block's last square: -inf where the key comes behind the query, else 0."""


@lru_cache(maxsize=16)
def _layout(sizes: Sizes, heads: int, shared: int) -> _Layout:
    """One serves all layers of a pass; there may be several passes at a time."""
    of_length: dict[int, list[tuple[int, int]]] = {}
    tokens = 0
    for size, is_example in sizes:
        if is_example:
            of_length.setdefault(-(-size // _UNIT) * _UNIT, []).append((tokens, size))
        tokens += size
    of_queries, of_keys = _Rows(tokens, heads), _Rows(tokens, shared)
    head = torch.arange(heads).view(1, shared, -1, 1)
    blocks = []
    for length, examples in of_length.items():
        first, count = torch.tensor(examples).unsqueeze(-1).unbind(1)
        place = torch.arange(length).minimum(count - 1)  # (examples, length)
        token, is_real = first + place, torch.arange(length) < count
        keys = of_keys.add(token[:, None], torch.arange(shared).view(1, -1, 1), is_real[:, None])
        for start in range(0, length, _BLOCK):
            part = slice(start, min(start + _BLOCK, length))
            rows = of_queries.add(token[:, None, None, part], head, is_real[:, None, None, part])
            blocks.append(_Block(rows, keys, len(examples) * shared, length, start, part.stop))
    later = torch.full((_BLOCK, _BLOCK), -torch.inf).triu_(1)
    queries, from_queries, rounding = of_queries.indices()
    keys_, from_keys, _ = of_keys.indices()
    return _Layout(blocks, queries, from_queries, keys_, from_keys, rounding, later)


class _Rows:
    """Collects which row of (tokens * heads) stands where."""

    def __init__(self, tokens: int, heads: int) -> None:
        self._all, self._heads = tokens * heads, heads
        # Not without any: a batch may be of padding alone.
        self._rows = [torch.empty(0, dtype=torch.long)]
        self._real = [torch.empty(0, dtype=torch.bool)]
        self._count = 0

    def add(self, token: torch.Tensor, head: torch.Tensor, is_real: torch.Tensor) -> slice:
        """The next rows, in the order of the arguments' common shape."""
        rows, real = torch.broadcast_tensors(token * self._heads + head, is_real)
        self._rows.append(rows.flatten())
        self._real.append(real.flatten())
        before, self._count = self._count, self._count + rows.numel()
        return slice(before, self._count)

    def indices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where from, where to, and which are there to round up."""
        rows, real = torch.cat(self._rows), torch.cat(self._real)
        back = torch.full((self._all,), self._count)
        back[rows[real]] = real.nonzero().squeeze(-1)
        return rows, back, (~real).nonzero().squeeze(-1)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, layout: _Layout
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.layout = scale, layout
        scaled, keys, values = _matrices(query, key, value, scale, layout)
        attended = _empty(values, layout.queries)
        with torch.autocast(query.device.type, enabled=False):
            for block in layout.blocks:
                probabilities = _probabilities(scaled, keys, block, layout)
                torch.bmm(probabilities, _of_keys(values, block), out=_of_queries(attended, block))
        return attended.to(query.dtype).index_select(0, layout.from_queries)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        layout: _Layout = ctx.layout
        scaled, keys, values = _matrices(query, key, value, ctx.scale, layout)
        dattended = _rows(gradients[0], layout.queries).to(scaled.dtype).index_fill_(0, layout.rounding, 0)
        wide = torch.promote_types(query.dtype, torch.float32)
        dquery = _empty(scaled, layout.queries)
        dkeys, dvalues = (of.new_zeros(len(of) + 1, of.shape[-1], dtype=wide) for of in (keys, values))
        for block in layout.blocks:
            probabilities = _probabilities(scaled, keys, block, layout)
            given = _of_queries(dattended, block)
            _of_keys(dvalues, block).add_(probabilities.transpose(1, 2) @ given)
            dprobabilities = given @ _of_keys(values, block).transpose(1, 2)
            dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, scaled.dtype)
            _of_keys(dkeys, block).add_(dscores.transpose(1, 2) @ _of_queries(scaled, block))
            torch.bmm(dscores, _of_keys(keys, block), out=_of_queries(dquery, block))
        back = [
            rows.to(of.dtype).index_select(0, index).view(of.shape)
            for rows, index, of in (
                (dquery, layout.from_queries, query),
                (dkeys, layout.from_keys, key),
                (dvalues, layout.from_keys, value),
            )
        ]
        return back[0].mul_(ctx.scale), back[1], back[2], None, None


def _matrices(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, layout: _Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    queries, keys, values = _rows(query * scale, layout.queries), _rows(key, layout.keys), _rows(value, layout.keys)
    return (queries.float(), keys.float(), values.float()) if is_wide(query) else (queries, keys, values)


def _rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).index_select(0, index)


def _empty(like: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows to be written, and one of zeros behind them."""
    rows = like.new_empty(len(index) + 1, like.shape[-1])
    rows[-1] = 0
    return rows


def _of_queries(rows: torch.Tensor, block: _Block) -> torch.Tensor:
    """(matrices, heads that share keys * queries, size)"""
    return rows[block.rows].view(block.matrices, -1, rows.shape[-1])


def _of_keys(rows: torch.Tensor, block: _Block) -> torch.Tensor:
    """(matrices, keys that the block sees, size)"""
    return rows[block.keys].view(block.matrices, block.length, -1)[:, : block.end]


def _probabilities(scaled: torch.Tensor, keys: torch.Tensor, block: _Block, layout: _Layout) -> torch.Tensor:
    """(matrices, heads that share keys * queries, keys that the block sees)"""
    scores = _of_queries(scaled, block) @ _of_keys(keys, block).transpose(1, 2)
    queries = block.end - block.start
    square = scores.view(block.matrices, -1, queries, block.end)[..., block.start :]
    square.add_(layout.later[:queries, :queries])  # a sixth of the time of `masked_fill_`
    return scores.softmax(-1)
