"""The order of the stream: complete, a function of the position alone, and shuffled where it should be."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rayloom.data.plan
from rayloom.data.files import Chunk
from rayloom.data.mixture import Mixture
from rayloom.data.plan import IndexedSet, Plan, Position, RowAddress

STRATEGIES = ("concat", "interleave_under", "interleave_over", "interleave_once")


def indexed(name: str, rows: list[int]) -> IndexedSet:
    """A data set with that many rows in each of its chunks; no file is needed to plan."""
    chunks, first = [], 0
    for count in rows:
        chunks.append(Chunk(name, 0, 1, count, first, 1))
        first += count
    return IndexedSet(name, "openai", tuple(chunks))


def make_plan(
    *sets: IndexedSet,
    strategy: str = "concat",
    weights: tuple[float, ...] | None = None,
    seed: int = 0,
    window: int = 4,
    epochs: int | None = 1,
) -> Plan:
    lengths = tuple(data_set.length for data_set in sets)
    return Plan(sets, Mixture(lengths, weights or (1.0,) * len(sets), strategy), seed, window, epochs)


@contextmanager
def groups_of(rows: int) -> Iterator[None]:
    """Shuffle rows within groups of this size, so that small data sets have several."""
    with mock.patch.object(rayloom.data.plan, "SHUFFLE_ROWS", rows):
        yield


@st.composite
def plans(draw: st.DrawFn, strategies: tuple[str, ...] = STRATEGIES) -> Plan:
    rows = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3))
    return make_plan(
        *(indexed(f"set{number}", counts) for number, counts in enumerate(rows)),
        strategy=draw(st.sampled_from(strategies)),
        weights=tuple(draw(st.lists(st.integers(1, 4), min_size=len(rows), max_size=len(rows)))),
        seed=draw(st.integers(0, 2**64)),
        window=draw(st.integers(1, 15)),
        epochs=draw(st.integers(1, 3)),
    )


def epoch(plan: Plan, number: int = 0) -> list[RowAddress]:
    return [address for index in range(plan.segments) for address in plan.segment(number, index)]


def rows_of(*sets: IndexedSet) -> list[RowAddress]:
    chunks = [(s, c, chunk.rows) for s, data_set in enumerate(sets) for c, chunk in enumerate(data_set.chunks)]
    return [RowAddress(s, c, row) for s, c, rows in chunks for row in range(rows)]


def in_set_order(plan: Plan, set_index: int, epoch_number: int = 0) -> list[tuple[int, int]]:
    """(chunk, row) of one set in the order in which it gives them: with a window of one nothing else is shuffled."""
    plan = Plan(plan.sets, plan.mixture, plan.seed, 1, plan.epochs)
    return [(item.chunk, item.row) for item in epoch(plan, epoch_number) if item.set == set_index]


# --- completeness ---------------------------------------------------------------------------------------------------


@given(plan=plans(("concat", "interleave_once")), group=st.integers(1, 12), number=st.integers(0, 2))
def test_every_row_comes_once_in_an_epoch(plan, group, number):
    with groups_of(group):
        addresses = epoch(plan, number)
    assert sorted(addresses, key=lambda a: (a.set, a.chunk, a.row)) == rows_of(*plan.sets)


@given(plan=plans(("interleave_over",)), group=st.integers(1, 12))
def test_a_set_that_repeats_gives_every_row_before_it_gives_one_again(plan, group):
    with groups_of(group):
        for number, data_set in enumerate(plan.sets):
            order = in_set_order(plan, number)
            for start in range(0, len(order), data_set.length):
                one_pass = order[start : start + data_set.length]
                assert len(set(one_pass)) == len(one_pass)


@given(plan=plans())
def test_segments_have_the_mixtures_share_of_every_set(plan):
    assert plan.segments == -(-plan.mixture.epoch_length // plan.window)
    for index in range(plan.segments):
        stop = min((index + 1) * plan.window, plan.mixture.epoch_length)
        before, after = plan.mixture.counts(index * plan.window), plan.mixture.counts(stop)
        drawn = Counter(address.set for address in plan.segment(0, index))
        assert [drawn[d] for d in range(len(plan.sets))] == [b - a for a, b in zip(before, after, strict=True)]


# --- a function of the position -------------------------------------------------------------------------------------


@given(plan=plans(), data=st.data())
def test_from_any_start_the_tail_of_the_whole_follows(plan, data):
    whole = [plan.segment(*key) for key in keys_from(plan, Position())]
    assert len(whole) == plan.epochs * plan.segments
    start = Position(data.draw(st.integers(0, plan.epochs - 1)), data.draw(st.integers(0, plan.segments - 1)), 7)
    fresh = pickle.loads(pickle.dumps(make_plan_again(plan)))
    tail = [fresh.segment(*key) for key in keys_from(fresh, start)]
    assert tail == whole[start.epoch * plan.segments + start.segment :]


def keys_from(plan: Plan, start: Position) -> list[tuple[int, int]]:
    return [plan.segment_after(start, number) for number in range(plan.segments_left(start))]


def make_plan_again(plan: Plan) -> Plan:
    """An equal plan that has been asked nothing yet."""
    return Plan(plan.sets, Mixture(plan.mixture.lengths, plan.mixture.weights, plan.mixture.strategy), plan.seed,
                plan.window, plan.epochs)  # fmt: skip


@given(plan=plans(), group=st.integers(1, 12), data=st.data())
def test_what_was_asked_before_changes_nothing(plan, group, data):
    keys = keys_from(plan, Position())
    with groups_of(group):
        in_order = {key: plan.segment(*key) for key in keys}
        asked = data.draw(st.lists(st.sampled_from(keys), max_size=12))
        other = make_plan_again(plan)
        assert [other.segment(*key) for key in asked] == [in_order[key] for key in asked]
        assert [other.segment(*key) for key in keys] == list(in_order.values())
        (key,) = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=1))
        assert pickle.loads(pickle.dumps(other)).segment(*key) == in_order[key]  # a copy with a filled cache


def test_without_epochs_the_segments_never_end():
    plan = make_plan(indexed("a", [3]), window=2, epochs=None)
    assert plan.segments_left(Position(5, 1)) is None
    assert [plan.segment_after(Position(5, 1), number) for number in range(4)] == [(5, 1), (6, 0), (6, 1), (7, 0)]


def test_positions_are_ordered_as_the_stream_is():
    positions = [Position(), Position(0, 0, 1), Position(0, 1, 0), Position(1, 0, 0), Position(1, 0, 9)]
    assert max(positions[1:3] + positions[:1]) == positions[2]
    assert sorted([*positions[3:], *positions[:3]]) == positions
    assert Position(1, 2, 3).as_dict() == {"epoch": 1, "segment": 2, "row": 3}


# --- shuffling ------------------------------------------------------------------------------------------------------


def test_golden():
    """Fixed for ever: a stopped job must resume in the order that it began in."""
    plan = make_plan(indexed("a", [3, 2]), indexed("b", [2]), seed=42, window=4)
    assert [[(a.set, a.chunk, a.row) for a in plan.segment(0, index)] for index in range(2)] == [
        [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)],
        [(1, 0, 0), (0, 1, 0), (0, 0, 2)],
    ]


def test_seeds_and_epochs_give_different_orders():
    sets = indexed("a", [8] * 8), indexed("b", [8] * 4)
    orders = [tuple(epoch(make_plan(*sets, seed=seed, window=16), n)) for seed in range(5) for n in range(5)]
    assert len(set(orders)) == 25


def test_sets_of_the_same_shape_are_shuffled_apart():
    """Translations in two files, line by line, must not meet in step."""
    plan = make_plan(indexed("a", [30]), indexed("b", [30]))
    assert in_set_order(plan, 0) != in_set_order(plan, 1)


def test_the_order_of_a_set_does_not_depend_on_the_other_sets():
    a, b, c = indexed("a", [5, 5, 5]), indexed("b", [4]), indexed("c", [9])
    with groups_of(4):
        assert in_set_order(make_plan(a, b), 0) == in_set_order(make_plan(b, c, a), 2)


def test_passes_within_an_epoch_are_shuffled_anew():
    short, long = indexed("short", [12]), indexed("long", [40] * 6)
    order = in_set_order(make_plan(short, long, strategy="interleave_over"), 0)
    passes = [tuple(order[start : start + 12]) for start in range(0, 240, 12)]
    assert len(order) == 240
    assert all(sorted(one) == [(0, row) for row in range(12)] for one in passes)
    assert len(set(passes)) == len(passes)


def test_examples_are_shuffled_within_a_segment():
    plan = make_plan(indexed("a", [50]), indexed("b", [50]), window=100)
    sets = [address.set for address in plan.segment(0, 0)]
    assert 30 < sum(one != other for one, other in pairwise(sets)) < 70  # 50 +- 5 by chance


@pytest.mark.parametrize("group", [1, 8, 9, 10, 10**9])
def test_rows_are_shuffled_within_groups_of_neighbouring_chunks(group):
    """A group takes chunks until it has that many rows, so reading stays local, and every group mixes its chunks."""
    data_set = indexed("a", [3] * 40)
    with groups_of(group):
        order = in_set_order(make_plan(data_set), 0)
    chunks_per_group = min(40, -(-group // 3))
    size = 3 * chunks_per_group
    groups = [order[start : start + size] for start in range(0, 120, size)]
    drawn = [{chunk for chunk, _ in one} for one in groups]
    assert all(len(chunks) == chunks_per_group for chunks in drawn[:-1])
    assert sum(map(len, drawn)) == 40  # no chunk in two groups
    order_of_chunks = list(dict.fromkeys(chunk for chunk, _ in order))
    assert order_of_chunks != sorted(order_of_chunks)
    assert [row for _, row in order] != [0, 1, 2] * 40


def test_a_plan_stays_small_however_much_it_has_been_asked():
    """It is sent to every task."""
    plan = make_plan(indexed("short", [3]), indexed("long", [50] * 4), strategy="interleave_over", window=20)
    epoch(plan, 0)
    size = len(pickle.dumps(plan))
    for number in range(1, 6):
        epoch(plan, number)
    assert len(pickle.dumps(plan)) < 1.2 * size


def test_large_windows_do_not_compute_orders_again_and_again():
    """In order of the slots, one set's pass and one group of chunks after the other is asked for."""
    plan = make_plan(indexed("short", [3]), indexed("long", [50] * 400), strategy="interleave_over", window=3000)
    plan.segment(0, 0)
    with (
        groups_of(100),
        mock.patch.object(rayloom.data.plan, "permutation", side_effect=rayloom.data.plan.permutation) as counted,
    ):
        plan.segment(0, 1)
    # 1500 rows of each set: 500 passes of the short one with two orders each; of the long one 16 groups at most.
    assert counted.call_count <= 1 + 2 * 502 + 2 + 17


# --- progress -------------------------------------------------------------------------------------------------------


def test_epochs_done():
    plan = make_plan(indexed("a", [10]), window=4)
    assert plan.epochs_done(0, 0, 1.0) == pytest.approx(0.4)
    assert plan.epochs_done(1, 2, 0.5) == pytest.approx(1.9)
    assert plan.epochs_done(1, 2, 1.0) == 2.0


@given(plan=plans())
def test_epochs_done_grows_without_gaps(plan):
    assert plan.epochs_done(0, 0, 0.0) == 0.0
    for index in range(plan.segments - 1):
        assert plan.epochs_done(3, index, 1.0) == plan.epochs_done(3, index + 1, 0.0)
    assert plan.epochs_done(3, plan.segments - 1, 1.0) == 4.0
