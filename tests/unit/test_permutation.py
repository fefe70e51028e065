"""The permutation against Philox written out in Python, after Salmon et al. 2011, "Parallel random numbers"."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayloom.data.permutation import permutation

MASK = 2**64 - 1
KEYS = st.lists(st.integers() | st.text() | st.floats(allow_nan=False), max_size=4)


def philox_4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """The paper's Philox4x64-10: ten rounds of two multiplications, the key bumped by Weyl constants between them."""
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & MASK,
            (first >> 64) ^ counter[3] ^ key[1],
            first & MASK,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


def test_the_reference_gives_the_papers_known_answers():
    """From the authors' `kat_vectors`."""
    assert philox_4x64_10([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B,
    ]  # fmt: skip
    assert philox_4x64_10([MASK] * 4, [MASK] * 2) == [
        0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0,
    ]  # fmt: skip


@given(length=st.integers(0, 40), key=KEYS)
def test_it_sorts_philox_keyed_by_a_hash(length, key):
    digest = hashlib.sha256(ascii(tuple(key)).encode()).digest()
    words = [int.from_bytes(digest[at : at + 8], "little") for at in (0, 8, 16, 24)]
    numbers: list[int] = []
    counter = words[2] + (words[3] << 64)
    while len(numbers) < length:
        counter += 1
        numbers += philox_4x64_10([(counter >> (64 * i)) & MASK for i in range(4)], words[:2])
    assert permutation(length, *key).tolist() == sorted(range(length), key=lambda i: numbers[i])


def test_golden():
    """Fixed for ever: a stopped job must resume in the order that it began in."""
    assert permutation(10, 42, 0, "segment", 0).tolist() == [5, 9, 7, 0, 1, 2, 3, 8, 6, 4]
    assert permutation(0, "x").tolist() == []
    assert permutation(1, "x").tolist() == [0]
    digest = hashlib.sha256(permutation(1_000_000, 42, "large").astype("<i8").tobytes()).hexdigest()
    assert digest == "da58cbb4dabb30ce6d28d03669795401290eea1ff7603bd1ec466ca87e0a1d0e"


@given(length=st.integers(0, 5000), key=KEYS)
def test_it_is_a_permutation(length, key):
    order = permutation(length, *key)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(length))


def test_keys_that_differ_give_orders_that_differ():
    keys: list[tuple[object, ...]] = [
        (seed, epoch, kind) for seed in range(10) for epoch in range(10) for kind in ("segment", "rows", "chunks")
    ]
    keys += [(), (1,), ("1",), (1.0,), (1, 2), (12,), ("a", "bc"), ("ab", "c"), ("a, b",), ("a", "b"), ((1, 2),)]
    assert len({tuple(permutation(64, *key)) for key in keys}) == len(keys)


def test_every_order_is_equally_likely():
    """Chi-square over the 24 orders of four: 23 degrees of freedom, and above 49.7 once in a thousand."""
    trials = 4800
    seen = Counter(tuple(permutation(4, "uniform", n)) for n in range(trials))
    expected = trials / 24
    assert len(seen) == 24
    assert sum((count - expected) ** 2 / expected for count in seen.values()) < 49.7
