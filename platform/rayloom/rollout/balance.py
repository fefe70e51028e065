"""Which engine answers which prompts."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace

from rayloom.rollout.request import Prompt


def work_of(prompt: Prompt, max_tokens: int) -> int:
    """Tokens that a prompt may cost: its own once (its answers share them in the prefix cache), and its answers'."""
    return len(prompt.token_ids) + prompt.samples * max_tokens


def split(work: Sequence[int], engines: int) -> list[list[int]]:
    """Deal pieces of work to engines: the longest first, each to the one with the least so far (Graham 1969: at most
    4/3 of the best possible). A pure function of its arguments; equal pieces go by their order.

    Args:
        work: what each piece costs, 0 or above.
        engines: at least 1.

    Returns:
        For each engine the indices of its pieces, ascending; every index once.
    """
    loads = [(0, engine) for engine in range(engines)]
    heapify(loads)
    shares: list[list[int]] = [[] for _ in range(engines)]
    for index in sorted(range(len(work)), key=lambda index: (-work[index], index)):
        load, engine = loads[0]
        shares[engine].append(index)
        heapreplace(loads, (load + work[index], engine))
    return [sorted(share) for share in shares]
