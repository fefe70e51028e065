"""The mixture against a walk that knows no arithmetic: it takes the earliest row, one slot at a time."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayloom.data.mixture import Mixture

STRATEGIES = ("concat", "interleave_under", "interleave_over", "interleave_once")


def walk(lengths: tuple[int, ...], weights: tuple[float, ...], strategy: str) -> list[tuple[int, int]]:
    """(set, row) of every slot of an epoch, from the rules of the module's table."""
    rates = [Fraction(str(w)) for w in weights]
    given_rows, slots = [0] * len(lengths), []
    while True:
        ran_out = [count >= length for count, length in zip(given_rows, lengths, strict=True)]
        if strategy != "interleave_under" and all(ran_out):
            return slots
        takes_part = [d for d in range(len(lengths)) if strategy.endswith(("under", "over")) or not ran_out[d]]
        nearest = min(takes_part, key=lambda d: ((given_rows[d] + Fraction(1, 2)) / rates[d], d))
        if strategy == "interleave_under" and ran_out[nearest]:
            return slots
        slots.append((nearest, given_rows[nearest]))
        given_rows[nearest] += 1


@st.composite
def mixtures(draw: st.DrawFn, strategies: tuple[str, ...] = STRATEGIES, longest: int = 25, sets: int = 5) -> Mixture:
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=sets))
    weight = st.integers(1, 5) | st.integers(2, 20).map(lambda n: n / 10) | st.floats(0.3, 3.0)
    weights = draw(st.lists(weight, min_size=len(lengths), max_size=len(lengths)))
    strategy = draw(st.sampled_from(strategies))
    return Mixture(tuple(lengths), tuple(lengths if strategy == "concat" else weights), strategy)


def shares(mixture: Mixture) -> list[Fraction]:
    return [rate / sum(mixture.rates) for rate in mixture.rates]


@given(mixture=mixtures(longest=12))
def test_slots_are_those_of_the_walk(mixture):
    slots = walk(mixture.lengths, mixture.weights, mixture.strategy)
    assert mixture.epoch_length == len(slots)
    counts = [0] * len(mixture.lengths)
    for n, (given_by, _) in enumerate(slots):
        assert mixture.counts(n) == tuple(counts)
        counts[given_by] += 1
    assert mixture.counts(len(slots)) == tuple(counts)


@given(mixture=mixtures(), data=st.data())
def test_a_range_of_slots_holds_the_rows_of_the_walk(mixture, data):
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, mixture.epoch_length)] * 2)))
    slots = walk(mixture.lengths, mixture.weights, mixture.strategy)[start:stop]
    drawn = [b - a for a, b in zip(mixture.counts(start), mixture.counts(stop), strict=True)]
    assert drawn == [sum(d == of for of, _ in slots) for d in range(len(mixture.lengths))]


@given(mixture=mixtures(), data=st.data())
def test_a_length_decides_nothing_before_the_set_has_run_out(mixture, data):
    hidden = data.draw(st.lists(st.booleans(), min_size=len(mixture.lengths), max_size=len(mixture.lengths)))
    unknown = Mixture(
        tuple(None if hide else n for hide, n in zip(hidden, mixture.lengths, strict=True)),
        mixture.weights,
        mixture.strategy,
    )
    for slots in range(mixture.epoch_length + 1):
        counts = mixture.counts(slots)
        if any(hide and count >= n for hide, count, n in zip(hidden, counts, mixture.lengths, strict=True)):
            break
        assert unknown.counts(slots) == counts
        assert unknown.epoch_length is None or unknown.epoch_length >= slots


@given(mixture=mixtures(("concat", "interleave_once")))
def test_concat_and_once_give_each_row_once(mixture):
    assert mixture.counts(mixture.epoch_length) == mixture.lengths


@given(mixture=mixtures(("interleave_under",)))
def test_under_repeats_nothing_and_uses_up_a_set(mixture):
    counts = mixture.counts(mixture.epoch_length)
    assert all(count <= length for count, length in zip(counts, mixture.lengths, strict=True))
    assert any(count == length for count, length in zip(counts, mixture.lengths, strict=True))


@given(mixture=mixtures(("interleave_over",)))
def test_over_leaves_no_row_out_and_ends_with_a_last_row(mixture):
    counts, before = mixture.counts(mixture.epoch_length), mixture.counts(mixture.epoch_length - 1)
    assert all(count >= length for count, length in zip(counts, mixture.lengths, strict=True))
    (last,) = (d for d in range(len(counts)) if counts[d] != before[d])
    assert counts[last] == mixture.lengths[last]


@settings(max_examples=60)
@given(mixture=mixtures(("concat", "interleave_under", "interleave_over"), longest=15, sets=7))
def test_shares_are_as_near_to_exact_as_the_docstring_says(mixture):
    """While no set is exhausted: within 1/2 + s (D - 2) / 2 rows of the exact share s of the slots."""
    exact, sets = shares(mixture), len(mixture.lengths)
    for n in range(mixture.epoch_length + 1):
        counts = mixture.counts(n)
        if mixture.strategy == "concat" and any(c == length for c, length in zip(counts, mixture.lengths, strict=True)):
            break
        for count, share in zip(counts, exact, strict=True):
            distance = abs(count - n * share)
            assert distance <= Fraction(1, 2) + share * (sets - 2) / 2 if sets > 1 else distance == 0
            assert distance < 1 or sets > 3


def test_one_large_set_among_many_small_ones_does_run_ahead():
    """Why the bound is no constant: ten small sets have their first row at the same late time."""
    mixture = Mixture((1000,) + (10,) * 10, (100,) + (1,) * 10, "interleave_under")
    assert mixture.counts(50)[0] == 50
    assert 50 - 50 * shares(mixture)[0] == Fraction(50, 11)
    assert Fraction(50, 11) <= Fraction(1, 2) + shares(mixture)[0] * 9 / 2


@given(
    lengths=st.lists(st.integers(1, 10**12), min_size=1, max_size=6),
    strategy=st.sampled_from(STRATEGIES),
    data=st.data(),
)
def test_sets_of_any_size_are_counted_without_walking(lengths, strategy, data):
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(lengths), max_size=len(lengths)))
    mixture = Mixture(tuple(lengths), tuple(weights), strategy)
    places = sorted(data.draw(st.lists(st.integers(0, mixture.epoch_length), min_size=1, max_size=4)))
    counted = [mixture.counts(n) for n in places]
    assert [sum(counts) for counts in counted] == places
    assert all(a <= b for one, other in pairwise(counted) for a, b in zip(one, other, strict=True))
    if places[0] < mixture.epoch_length:
        steps = [b - a for a, b in zip(counted[0], mixture.counts(places[0] + 1), strict=True)]
        assert sorted(steps) == [0] * (len(lengths) - 1) + [1]


def test_golden():
    """Times of set 0 (weight 2): 1/4 3/4 5/4 7/4 (9/4); of set 1 (weight 1): 1/2 3/2 (5/2)."""
    under = Mixture((4, 2), (2, 1), "interleave_under")
    assert [under.counts(n) for n in range(7)] == [(0, 0), (1, 0), (1, 1), (2, 1), (3, 1), (3, 2), (4, 2)]
    assert under.epoch_length == 6
    # Set 1 ends at 3/2 and would give its fourth row at 7/2; set 0 goes on alone, or repeats, or ends the epoch.
    once = Mixture((4, 1), (2, 1), "interleave_once")
    assert [once.counts(n) for n in range(6)] == [(0, 0), (1, 0), (1, 1), (2, 1), (3, 1), (4, 1)]
    over = Mixture((4, 1), (2, 1), "interleave_over")
    assert [over.counts(n) for n in range(7)] == [(0, 0), (1, 0), (1, 1), (2, 1), (3, 1), (3, 2), (4, 2)]
    assert Mixture((4, 1), (2, 1), "interleave_under").epoch_length == 4  # ends before set 1's second row at 3/2
    assert Mixture((4, None), (2, 1), "interleave_under").epoch_length == 6  # set 0's fifth row would stand at 9/4
    assert Mixture((4, None), (2, 1), "interleave_over").epoch_length is None
    assert Mixture((None, None), (2, 1), "interleave_once").counts(9) == (6, 3)


def test_ties_go_to_the_earlier_set():
    mixture = Mixture((3, 3, 3), (1, 1, 1), "interleave_once")
    assert [mixture.counts(n) for n in range(5)] == [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 1, 1)]


def test_weights_mean_the_decimals_that_were_written():
    """0.1 as a binary fraction is a little more than a third of 0.3, which would decide ties otherwise."""
    written, whole = Mixture((50, 50), (0.1, 0.3), "interleave_over"), Mixture((50, 50), (1, 3), "interleave_over")
    assert written.epoch_length == whole.epoch_length
    assert all(written.counts(n) == whole.counts(n) for n in range(whole.epoch_length + 1))


@pytest.mark.parametrize(
    ("lengths", "weights", "message"),
    [
        ((), (), "0 lengths and 0 weights"),
        ((1, 2), (1,), "2 lengths and 1 weights"),
        ((1, 0), (1, 1), r"lengths are \(1, 0\)"),
        ((1, 1), (1, 0), r"weights are \(1, 0\)"),
        ((1, 1), (1, -2.5), r"weights are \(1, -2.5\)"),
    ],
)
def test_what_is_no_mixture(lengths, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(lengths, weights, "concat")


@pytest.mark.parametrize("slots", [-1, 6])
def test_slots_beyond_the_epoch(slots):
    with pytest.raises(ValueError, match=rf"slots must lie in 0..5, not {slots}"):
        Mixture((2, 3), (1, 1), "concat").counts(slots)
