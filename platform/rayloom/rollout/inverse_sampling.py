"""Drawing tokens by the sums of their probabilities (inverse transform sampling), for engines on CPU.

vLLM 0.32 draws on CPU by noise on every logit, of which the largest wins: two logarithms for each of 50,000 tokens of a
vocabulary, an eighth of the time of a small model's answers. One uniform number a row does as well: the token is the
first one whose cumulative probability is above it (Devroye, Non-Uniform Random Variate Generation, 1986, III.2). Where
to look is told by sums of blocks, so that no cumulative sum over the vocabulary is written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

BLOCK = 256
"""Tokens of the vocabulary that one sum is kept of."""


def uniform_numbers(rows: int, generators: Mapping[int, torch.Generator]) -> torch.Tensor:
    """(rows,) float64 in [0, 1): of a row with a generator that generator's next."""
    numbers = torch.rand(rows, dtype=torch.float64)
    for row, generator in generators.items():
        numbers[row] = torch.rand((), generator=generator, dtype=torch.float64)
    return numbers


def draw_tokens(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token of each row whose cumulative probability is above the row's number. Sums are in float64. A token
    without probability is never drawn. A row with a NaN gives some token: what it says of it is NaN too, and is found
    out where that is read.

    Args:
        probabilities: (rows, vocabulary) float32, at least one above 0 in each row; a row need not sum to 1.
        uniform: (rows,) float64 in [0, 1).

    Returns:
        (rows,) int64 in [0, vocabulary).
    """
    blocks = torch.nn.functional.pad(probabilities, (0, -probabilities.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    above = uniform.unsqueeze(1) * sums.sum(1, keepdim=True)
    block, above = _first_above(sums, above)
    inner = blocks[torch.arange(len(blocks)), block[:, 0]].double()
    token, _ = _first_above(inner, above)
    return (block * BLOCK + token)[:, 0].clamp_(max=probabilities.shape[1] - 1)  # where a row is NaN


def _first_above(weights: torch.Tensor, bound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of weights (rows, n) the first place whose cumulative sum is above the bound (rows, 1), and what of the bound is
    left for that place's own weight. A bound that rounding has put at the whole sum is one below it."""
    cumulative = weights.cumsum(1)
    bound = bound.minimum(cumulative[:, -1:].nextafter(torch.zeros_like(bound)))
    place = torch.searchsorted(cumulative, bound, right=True).clamp_(max=weights.shape[1] - 1)
    before = torch.where(place > 0, cumulative.gather(1, (place - 1).clamp_(min=0)), 0.0)
    return place, (bound - before).clamp_(min=0)
