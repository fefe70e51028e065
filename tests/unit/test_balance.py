"""Which engine answers which prompts: every piece once, the same way each time, no engine far behind the others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rayloom.data.pack import split_evenly
from rayloom.rollout.request import Prompt


def test_the_longest_goes_first_to_the_engine_with_least_work() -> None:
    assert split_evenly([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]  # 5 | 4 -> 5 | 4+3 -> 5+3 | 7 -> 8 | 7+3
    assert split_evenly([], 3) == [[], [], []]
    assert split_evenly([1], 2) == [[0], []]


def test_equal_pieces_go_by_their_order() -> None:
    assert split_evenly([7, 7, 7, 7], 2) == [[0, 2], [1, 3]]


def test_a_prompt_counts_once_and_each_of_its_answers() -> None:
    assert Prompt(0, (1, 2, 3), seed=0, samples=4).work(max_tokens=10) == 43


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 6))
def test_every_piece_once_and_within_the_bound_of_graham(work: list[int], engines: int) -> None:
    shares = split_evenly(work, engines)
    assert sorted(index for share in shares for index in share) == list(range(len(work)))
    loads = [sum(work[index] for index in share) for share in shares]
    # List scheduling: the last piece of the longest went to the engine that had least.
    assert max(loads) <= sum(work) / engines + max(work, default=0)
