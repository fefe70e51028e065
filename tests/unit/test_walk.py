"""The order of the stream: complete, a function of the position alone, and shuffled where it should be."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rayloom.data.plan
from rayloom.data.description import Description
from rayloom.data.mixture import Mixture
from rayloom.data.plan import DataSet, Plan, Position, Segment
from rayloom.data.rows import flatten_cursors, position_from
from rayloom.data.walk import Walk

STRATEGIES = ("concat", "interleave_under", "interleave_over", "interleave_once")
Address = tuple[int, int, int]


def data_set(name: str, rows: list[int], *, known: bool = False, estimated: int | None = None) -> DataSet:
    """A data set with that many rows in each of its chunks; no file is needed to plan."""
    file: Any = SimpleNamespace(chunks=len(rows), chunk_rows=tuple(rows) if known else None, counted=tuple(rows))
    return DataSet(name, Description(format="openai"), (file,), estimated or sum(rows))


def count(of: DataSet, chunk: int) -> int:
    file: Any = of.files[0]
    return file.counted[chunk]


def make_plan(
    *sets: DataSet,
    strategy: Any = "concat",
    weights: tuple[float, ...] | None = None,
    seed: int = 0,
    window: int = 4,
    epochs: int | None = 1,
) -> Plan:
    if strategy == "concat":
        weights = tuple(float(item.estimated_rows) for item in sets)
    return Plan(sets, weights or (1.0,) * len(sets), strategy, seed, window, epochs)


@contextmanager
def groups_of(rows: int) -> Iterator[None]:
    """Shuffle rows within groups of this size, so that small data sets have several."""
    with mock.patch.object(rayloom.data.plan, "SHUFFLE_ROWS", rows):
        yield


@st.composite
def plans(draw: st.DrawFn, strategies: tuple[str, ...] = STRATEGIES) -> Plan:
    """Sets with empty chunks among the others, of known and unknown length, with good and bad estimates."""
    sets = []
    for number in range(draw(st.integers(1, 3))):
        rows = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any))
        known = draw(st.booleans())
        estimated = sum(rows) if known else draw(st.integers(1, 2 * sum(rows)))
        sets.append(data_set(f"set{number}", rows, known=known, estimated=estimated))
    return make_plan(
        *sets,
        strategy=draw(st.sampled_from(strategies)),
        weights=tuple(draw(st.lists(st.integers(1, 4), min_size=len(sets), max_size=len(sets)))),
        seed=draw(st.integers(0, 2**64)),
        window=draw(st.integers(1, 15)),
        epochs=draw(st.integers(1, 3)),
    )


GROUPS = st.integers(1, 12)


def walk(plan: Plan) -> Walk:
    return Walk(plan, count)


def addresses(segment: Segment) -> list[Address]:
    return list(zip(segment.sets.tolist(), segment.chunks.tolist(), segment.rows.tolist(), strict=True))


def stream(plan: Plan, start: Position = Position()) -> list[tuple[Position, list[Address]]]:  # noqa: B008 frozen
    return [(segment.start, addresses(segment)) for segment in walk(plan).segments(start)]


def epoch(plan: Plan, number: int = 0) -> list[Address]:
    return [address for start, items in stream(plan) if start.epoch == number for address in items]


def rows_of(plan: Plan) -> list[Address]:
    return [
        (number, chunk, row)
        for number, item in enumerate(plan.sets)
        for chunk in range(item.chunks)
        for row in range(count(item, chunk))
    ]


def true_mixture(plan: Plan) -> Mixture:
    return plan.mixture([sum(count(item, chunk) for chunk in range(item.chunks)) for item in plan.sets])


def in_set_order(plan: Plan, set_index: int) -> list[tuple[int, int]]:
    """(chunk, row) of one set in the order in which it gives them: with a window of one nothing else is shuffled."""
    return [(chunk, row) for number, chunk, row in epoch(replace(plan, window=1)) if number == set_index]


# --- completeness ---------------------------------------------------------------------------------------------------


@given(plan=plans(("concat", "interleave_once")), group=GROUPS)
def test_every_row_comes_once_in_every_epoch(plan, group):
    with groups_of(group):
        for number in range(plan.epochs):
            assert sorted(epoch(plan, number)) == rows_of(plan)


@given(plan=plans(("interleave_over",)), group=GROUPS)
def test_a_set_that_repeats_gives_every_row_before_it_gives_one_again(plan, group):
    with groups_of(group):
        for number, length in enumerate(true_mixture(plan).lengths):
            order = in_set_order(plan, number)
            for start in range(0, len(order), length):
                one_pass = order[start : start + length]
                assert len(set(one_pass)) == len(one_pass)


@given(plan=plans(), group=GROUPS)
def test_segments_are_the_mixture_that_knows_all_lengths(plan, group):
    """What is learnt of the lengths on the way comes in time: nothing is otherwise than if all had been known."""
    mixture = true_mixture(plan)
    with groups_of(group):
        segments = stream(plan)
    per_epoch = -(-mixture.epoch_length // plan.window)
    assert [(s.epoch, s.segment) for s, _ in segments] == [
        (number, index) for number in range(plan.epochs) for index in range(per_epoch)
    ]
    for start, items in segments:
        first = start.segment * plan.window
        before, after = (mixture.counts(min(n, mixture.epoch_length)) for n in (first, first + plan.window))
        drawn = Counter(number for number, _, _ in items)
        assert [drawn[d] for d in range(len(plan.sets))] == [b - a for a, b in zip(before, after, strict=True)]


# --- a function of the position -------------------------------------------------------------------------------------


@given(plan=plans(), group=GROUPS, data=st.data())
def test_from_any_position_the_rest_of_the_stream_follows(plan, group, data):
    with groups_of(group):
        whole = stream(plan)
        at = data.draw(st.integers(0, len(whole) - 1))
        saved = json.loads(json.dumps(replace(whole[at][0], row=7).as_dict()))  # as a checkpoint keeps it
        fresh = pickle.loads(pickle.dumps(plan))
        assert stream(fresh, Position.from_dict(saved))[1:] == whole[at + 1 :]
        assert [items for _, items in stream(fresh, Position.from_dict(saved))] == [items for _, items in whole[at:]]


@given(plan=plans(), group=GROUPS, data=st.data())
def test_what_was_asked_before_changes_nothing(plan, group, data):
    with groups_of(group):
        whole = stream(plan)
        asked = data.draw(st.lists(st.sampled_from(whole), max_size=12))
        one = walk(plan)
        assert [addresses(one.step(start)[0]) for start, _ in asked] == [items for _, items in asked]


@given(plan=plans(), group=GROUPS)
def test_a_position_survives_as_whole_numbers(plan, group):
    with groups_of(group):
        for start, _ in stream(plan):
            assert position_from([start.epoch, start.segment, 3, *flatten_cursors(start)]) == replace(start, row=3)


def test_only_the_chunks_that_are_needed_are_counted():
    """The first segment of a large set costs a few chunks, not a scan."""
    counted = []
    plan = make_plan(data_set("large", [100] * 5000), data_set("other", [100] * 5000), window=512)

    def watched(of: DataSet, chunk: int) -> int:
        counted.append((of.name, chunk))
        return count(of, chunk)

    one = Walk(plan, watched)
    segment, after = one.step(Position())
    assert len(segment) == 512
    assert len(counted) == 2 * -(-4096 // 100)
    one.step(after)
    assert len(counted) == 2 * -(-4096 // 100)


def test_without_epochs_the_segments_never_end():
    plan = make_plan(data_set("a", [3]), window=2, epochs=None)
    assert plan.segments_left(Position(5, 1)) is None
    segments = walk(plan).segments(Position())
    assert [(s.start.epoch, s.start.segment) for s, _ in zip(segments, range(5), strict=False)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
    ]


def test_a_sample_is_the_same_rows_in_every_epoch():
    item = replace(data_set("a", [5, 5, 5, 5]), chosen=(2, 0), last_rows=3, estimated_rows=8)
    plan = make_plan(item, epochs=3)
    first = sorted(epoch(plan, 0))
    assert len(first) == 8
    assert {chunk for _, chunk, _ in first} == {0, 2}
    assert sum(chunk == 2 for _, chunk, _ in first) == 5
    assert first == sorted(epoch(plan, 1)) == sorted(epoch(plan, 2))
    assert epoch(plan, 0) != epoch(plan, 1)


# --- shuffling ------------------------------------------------------------------------------------------------------


def test_golden():
    """Fixed for ever: a stopped job must resume in the order that it began in."""
    plan = make_plan(data_set("a", [3, 2]), data_set("b", [2]), seed=42, window=4)
    assert [items for _, items in stream(plan)] == [
        [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)],
        [(1, 0, 0), (0, 1, 0), (0, 0, 2)],
    ]


def test_seeds_and_epochs_give_different_orders():
    sets = data_set("a", [8] * 8), data_set("b", [8] * 4)
    orders = [tuple(epoch(make_plan(*sets, seed=seed, window=16, epochs=5), n)) for seed in range(5) for n in range(5)]
    assert len(set(orders)) == 25


def test_sets_of_the_same_shape_are_shuffled_apart():
    """Translations in two files, line by line, must not meet in step."""
    plan = make_plan(data_set("a", [30]), data_set("b", [30]))
    assert in_set_order(plan, 0) != in_set_order(plan, 1)


def test_the_order_of_a_set_does_not_depend_on_the_other_sets():
    a, b, c = data_set("a", [5, 5, 5]), data_set("b", [4]), data_set("c", [9])
    with groups_of(4):
        assert in_set_order(make_plan(a, b), 0) == in_set_order(make_plan(b, c, a), 2)


def test_passes_within_an_epoch_are_shuffled_anew():
    short, long = data_set("short", [12]), data_set("long", [40] * 6)
    order = in_set_order(make_plan(short, long, strategy="interleave_over"), 0)
    passes = [tuple(order[start : start + 12]) for start in range(0, 240, 12)]
    assert len(order) == 240
    assert all(sorted(one) == [(0, row) for row in range(12)] for one in passes)
    assert len(set(passes)) == len(passes)


def test_examples_are_shuffled_within_a_segment():
    plan = make_plan(data_set("a", [50]), data_set("b", [50]), window=100)
    sets = [number for number, _, _ in epoch(plan)]
    assert 30 < sum(one != other for one, other in pairwise(sets)) < 70  # 50 +- 5 by chance


@pytest.mark.parametrize("group", [1, 8, 9, 10, 10**9])
def test_rows_are_shuffled_within_groups_of_neighbouring_chunks(group):
    """A group has chunks for about that many rows, so reading stays local, and every group mixes its chunks."""
    with groups_of(group):
        order = in_set_order(make_plan(data_set("a", [3] * 40)), 0)
    size = 3 * min(40, -(-group // 3))
    groups = [order[start : start + size] for start in range(0, 120, size)]
    drawn = [{chunk for chunk, _ in one} for one in groups]
    assert all(len(chunks) == size // 3 for chunks in drawn[:-1])
    assert sum(map(len, drawn)) == 40  # no chunk in two groups
    order_of_chunks = list(dict.fromkeys(chunk for chunk, _ in order))
    assert order_of_chunks != sorted(order_of_chunks)
    assert [row for _, row in order] != [0, 1, 2] * 40


# --- progress -------------------------------------------------------------------------------------------------------


def test_epochs_done():
    segments = list(walk(make_plan(data_set("a", [10], known=True), window=4, epochs=2)).segments(Position()))
    assert segments[0].epochs_done(1.0) == pytest.approx(0.4)
    assert segments[5].epochs_done(0.5) == pytest.approx(1.9)
    assert segments[5].epochs_done(1.0) == 2.0


@given(plan=plans(), group=GROUPS)
def test_epochs_done_is_exact_at_the_ends_of_epochs(plan, group):
    with groups_of(group):
        segments = list(walk(plan).segments(Position()))
    for one, other in pairwise(segments):
        if one.start.epoch != other.start.epoch:
            assert one.epochs_after == other.epochs_before == other.start.epoch
    assert segments[0].epochs_before == 0.0
    assert segments[-1].epochs_after == plan.epochs
    assert all(s.start.epoch <= s.epochs_before <= s.epochs_after <= s.start.epoch + 1 for s in segments)
