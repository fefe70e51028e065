"""Draws by sums of probabilities: the definition, to the token, and vLLM's function that they stand in for."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayloom.rollout import vllm_cpu
from rayloom.rollout.inverse_sampling import BLOCK, draw_tokens, uniform_numbers

LAST = 1 - 2.0**-53
"""The largest float64 below 1."""
VOCABULARIES = st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])


def drawn(weights: np.ndarray, uniform: float) -> int:
    """The definition: the first token whose cumulative weight is above `uniform` of all."""
    cumulative = np.cumsum(weights.astype(np.float64))
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


@settings(deadline=None)
@given(vocabulary=VOCABULARIES, seed=st.integers(0, 2**32 - 1), share=st.floats(0.01, 1))
def test_they_are_the_definitions(vocabulary: int, seed: int, share: float) -> None:
    """Whole numbers as weights: every sum is exact, in whatever order it is made."""
    random = np.random.default_rng(seed)
    weights = random.integers(0, 1000, (4, vocabulary)) * (random.random((4, vocabulary)) < share)
    weights[:, random.integers(vocabulary)] += 1
    uniform = random.integers(0, 2**20, 4) / 2.0**20
    uniform[0] = 0
    found = draw_tokens(torch.tensor(weights, dtype=torch.float32), torch.tensor(uniform))
    assert found.tolist() == [drawn(row, number) for row, number in zip(weights, uniform, strict=True)]


@settings(deadline=None)
@given(
    vocabulary=VOCABULARIES,
    seed=st.integers(0, 2**32 - 1),
    uniform=st.one_of(st.sampled_from([0.0, LAST, 0.5, 2.0**-60]), st.floats(0, LAST)),
)
def test_what_has_no_probability_is_never_drawn(vocabulary: int, seed: int, uniform: float) -> None:
    torch.manual_seed(seed)
    logits = 40 * torch.randn(8, vocabulary)  # from 1 down to what float32 cannot tell from 0
    logits[torch.rand(8, vocabulary) < 0.7] = -torch.inf
    logits[torch.arange(8), torch.randint(vocabulary, (8,))] = 1.0
    probabilities = logits.softmax(-1)
    found = draw_tokens(probabilities, torch.full((8,), uniform, dtype=torch.float64))
    assert bool((probabilities.gather(1, found[:, None]) > 0).all())


def test_each_token_is_drawn_as_often_as_its_probability_says() -> None:
    """Numbers evenly over [0, 1), so the counts are the probabilities to one draw."""
    torch.manual_seed(0)
    rows, vocabulary = 20_000, 700
    probabilities = (3 * torch.randn(vocabulary)).softmax(-1)
    uniform = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    counts = draw_tokens(probabilities.expand(rows, -1), uniform).bincount(minlength=vocabulary)
    assert float((counts - rows * probabilities).abs().max()) <= 1.01


def test_a_large_vocabulary_to_the_digit() -> None:
    torch.manual_seed(0)
    probabilities = (2 * torch.randn(64, 49_152)).softmax(-1)
    uniform = torch.rand(64, dtype=torch.float64)
    expected = [drawn(row, number) for row, number in zip(probabilities.numpy(), uniform.tolist(), strict=True)]
    assert draw_tokens(probabilities, uniform).tolist() == expected


def test_a_row_that_is_not_a_number_gives_some_token() -> None:
    probabilities = torch.full((2, BLOCK + 3), torch.nan)
    probabilities[1] = 0
    probabilities[1, 5] = 1
    first, second = draw_tokens(probabilities, torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist()
    assert 0 <= first < BLOCK + 3
    assert second == 5


def test_a_row_with_a_generator_has_that_ones_numbers() -> None:
    def number(rows: int, row: int) -> float:
        return float(uniform_numbers(rows, {row: torch.Generator().manual_seed(7)})[row])

    assert number(4, 2) == number(1, 0)  # whoever is beside it
    generator = torch.Generator().manual_seed(7)
    first, second = (float(uniform_numbers(1, {0: generator})[0]) for _ in range(2))
    assert first == number(1, 0) != second
    assert len(set(uniform_numbers(4, {}).tolist())) == 4
    assert uniform_numbers(4, {}).dtype == torch.float64


def test_what_is_left_to_vllm() -> None:
    calls: list[Any] = []

    def theirs(*given: Any) -> tuple[torch.Tensor, None]:
        calls.append(given)
        return torch.zeros(2), None

    def restrict(logits: torch.Tensor, k: Any, p: Any) -> torch.Tensor:
        assert (k, p) == ("k", "p")
        return torch.where(logits < 1, -torch.inf, logits)

    draws = vllm_cpu._draws_or_theirs(theirs, restrict)
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.5]])
    tokens, log_probs = draws(
        SimpleNamespace(use_fp64_gumbel=False, logprobs_mode="processed_logprobs"), logits, {}, "k", "p"
    )
    assert not calls
    assert int(tokens[0]) in {1, 2}
    assert int(tokens[1]) == 0
    torch.testing.assert_close(
        log_probs, torch.tensor([[-torch.inf, -1.3132617, -0.3132617], [0.0] + [-torch.inf] * 2])
    )
    draws(SimpleNamespace(use_fp64_gumbel=True, logprobs_mode="processed_logprobs"), logits, {}, "k", "p")
    draws(SimpleNamespace(use_fp64_gumbel=False, logprobs_mode="raw_logprobs"), logits, {}, "k", "p")
    assert len(calls) == 2


def test_vllm_still_has_the_function_that_is_replaced() -> None:
    """And still draws by noise there: where this fails, `inverse_sampling` may be needed no more."""
    sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler").TopKTopPSampler
    if not getattr(sampler.forward_cpu, "is_ours", False):  # an engine of this process may have been here
        assert list(inspect.signature(sampler.forward_cpu).parameters) == ["self", "logits", "generators", "k", "p"]
        assert "fused_gumbel_argmax" in inspect.getsource(sampler.forward_cpu)
