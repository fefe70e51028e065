"""One segment from files to token rows: the planned examples, in the planned order, counted where they are left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rayloom.data.example import Example
from rayloom.data.files import index_file
from rayloom.data.mixture import Mixture
from rayloom.data.plan import IndexedSet, Plan
from rayloom.data.segment import encode_segment, read_segment
from rayloom.errors import RequestError


class Letters:
    """An encoder for tests: a token for every letter of the answer, trained where it is upper case."""

    def encode(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
        texts = [example.messages[-1].content for example in examples]
        return [([ord(c) for c in text], [ord(c) if c.isupper() else -100 for c in text]) for text in texts]


def make_plan(folder: Path, answers: dict[str, list[str]], window: int = 5) -> Plan:
    """A plan over real files that are cut into small chunks."""
    sets = []
    for name, texts in answers.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"instruction": "Q", "output": text}) + "\n" for text in texts))
        sets.append(IndexedSet(name, "alpaca", tuple(index_file(str(path), chunk_bytes=100))))
    lengths = tuple(data_set.length for data_set in sets)
    return Plan(tuple(sets), Mixture(lengths, (1.0,) * len(sets), "concat"), 3, window, 1)


def test_a_segment_holds_the_planned_rows_in_the_planned_order(tmp_path):
    answers = {"a": [f"A{i}" for i in range(9)], "b": [f"B{i}" for i in range(4)]}
    plan = make_plan(tmp_path, answers)
    assert len(plan.sets[0].chunks) > 2
    seen = []
    for segment in range(plan.segments):
        items = read_segment(plan, 0, segment)
        for (set_index, row, example), address in zip(items, plan.segment(0, segment), strict=True):
            chunk = plan.sets[address.set].chunks[address.chunk]
            assert (set_index, row) == (address.set, chunk.first_row + address.row)
            assert example.messages[-1].content == answers["ab"[set_index]][row]
            seen.append((set_index, row))
    assert sorted(seen) == [(0, row) for row in range(9)] + [(1, row) for row in range(4)]


def test_examples_that_cannot_be_trained_on_are_counted_by_set_and_reason(tmp_path):
    answers = {
        "a": ["AB", "TOOLONG!", "ab", "ABCDEF"],  # at the cutoff is not above it
        "b": ["Ab", "C", "aB", "alsotoolong"],  # "Ab" trains its first token alone, which nothing predicts; so does "C"
    }
    plan = make_plan(tmp_path, answers, window=8)
    table = encode_segment(plan, 0, 0, Letters(), cutoff=6, packing=False)
    kept = {(s, r) for sets, rows in zip(table["sets"].to_pylist(), table["rows"].to_pylist(), strict=True)
            for s, r in zip(sets, rows, strict=True)}  # fmt: skip
    assert kept == {(0, 0), (0, 3), (1, 2)}
    assert table["dropped"].to_pylist() == [[1, 1, 1, 2], [], []]


def test_packing_changes_who_shares_a_row_and_nothing_else(tmp_path):
    plan = make_plan(tmp_path, {"a": ["A" * (2 + i % 4) for i in range(20)]}, window=20)
    single = encode_segment(plan, 0, 0, Letters(), cutoff=8, packing=False)
    packed = encode_segment(plan, 0, 0, Letters(), cutoff=8, packing=True)
    assert single.num_rows == 20
    assert packed.num_rows <= 10
    for name in ("input_ids", "labels", "rows"):
        assert sorted(x for row in packed[name].to_pylist() for x in row) == sorted(
            x for row in single[name].to_pylist() for x in row
        )
    assert all(len(ids) <= 8 for ids in packed["input_ids"].to_pylist())


def test_a_row_that_went_bad_is_named(tmp_path):
    plan = make_plan(tmp_path, {"a": ["A", "B"]})
    path = tmp_path / "a.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"output": "B"', b'"outptu": "B"'))
    with pytest.raises(RequestError) as refused:
        read_segment(plan, 0, 0)
    assert refused.value.messages == (
        f"{path}:2: row 2: has no column 'output'; its columns are 'instruction', 'outptu' (read as alpaca)",
    )
