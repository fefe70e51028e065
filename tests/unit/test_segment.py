"""One segment from files to token rows: the planned examples, in the planned order, counted where they are left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rayloom.data.description import Description
from rayloom.data.encoding import Encoding
from rayloom.data.example import Example
from rayloom.data.files import estimate_rows, locate
from rayloom.data.plan import DataSet, Plan, Position, Segment
from rayloom.data.rows import COUNTERS
from rayloom.data.segment import EncodeSegment, SegmentOptions, read_segment
from rayloom.data.walk import Walk
from rayloom.errors import RequestError

OPTIONS = SegmentOptions(cutoff=6, packing=False)


class Letters:
    """An encoder for tests: a token for every letter of the answer, trained where it is upper case."""

    splits = False

    def encode(self, examples: Sequence[Example], cutoff: int) -> list[Encoding]:
        return [self._encode(example.messages[-1].content, cutoff) for example in examples]

    def _encode(self, text: str, cutoff: int) -> Encoding:
        if text.startswith("?"):
            return Encoding([], [], fault="the template says no")
        cut = text[:cutoff]
        return Encoding([ord(c) for c in cut], [ord(c) if c.isupper() else -100 for c in cut], len(text) - len(cut))


class Text(Letters):
    """Plain text: every letter is trained, and what is long goes on."""

    splits = True

    def encode(self, examples: Sequence[Example], cutoff: int) -> list[Encoding]:
        texts = [[ord(c) for c in example.messages[-1].content] for example in examples]
        return [Encoding(ids, ids) for ids in texts]


def make_plan(folder: Path, answers: dict[str, list[str]], window: int = 5) -> Plan:
    """A plan over real files that are cut into small chunks."""
    sets = []
    for name, texts in answers.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"instruction": "Q", "output": text}) + "\n" for text in texts))
        files = locate(str(path), chunk_bytes=100)
        sets.append(DataSet(name, Description(format="alpaca"), files, estimate_rows(files)))
    weights = tuple(float(data_set.estimated_rows) for data_set in sets)
    return Plan(tuple(sets), weights, "concat", 3, window, 1)


def segments(plan: Plan) -> list[Segment]:
    return list(Walk(plan).segments(Position()))


def counts(table, number: int) -> dict[str, int]:
    """What is counted of one set, without the zeros."""
    numbers = table["counts"][0].as_py()[number * len(COUNTERS) : (number + 1) * len(COUNTERS)]
    return {name: count for name, count in zip(COUNTERS, numbers, strict=True) if count}


def test_the_segments_hold_every_row_once(tmp_path):
    answers = {"a": [f"A{i}" for i in range(9)], "b": [f"B{i}" for i in range(4)]}
    plan = make_plan(tmp_path, answers)
    assert plan.sets[0].chunks > 2
    seen = []
    for segment in segments(plan):
        items = read_segment(plan, segment, OPTIONS)
        assert [item.set for item in items] == segment.sets.tolist()
        assert [item.row for item in items] == [
            c << 32 | r for c, r in zip(segment.chunks.tolist(), segment.rows.tolist(), strict=True)
        ]
        seen += [item.example.messages[-1].content for item in items if item.example]
    assert sorted(seen) == sorted(answers["a"] + answers["b"])


def test_examples_are_counted_by_set_and_fate(tmp_path):
    answers = {
        "a": ["AB", "TOOLONG!", "ab", "ABCDEF"],  # at the cutoff is not above it
        "b": ["Ab", "C", "aB", "alsotoolong", "?"],  # "Ab" trains its first token alone, which nothing predicts
    }
    plan = make_plan(tmp_path, answers, window=9)
    (segment,) = segments(plan)
    table = EncodeSegment(Letters(), replace(OPTIONS, on_bad_row="skip"))(plan, segment)
    assert sorted("".join(map(chr, ids)) for ids in table["input_ids"].to_pylist()) == ["AB", "ABCDEF", "TOOLON", "aB"]
    assert counts(table, 0) == {"nothing to train": 1, "cut": 1, "tokens cut": 2}
    assert counts(table, 1) == {"nothing to train": 3, "refused by the template": 1}


def test_long_text_goes_on_in_further_rows(tmp_path):
    """Every token but a text's first is predicted exactly once."""
    plan = make_plan(tmp_path, {"a": ["abcdefghijklmnop", "xyz", "q"]}, window=3)
    (segment,) = segments(plan)
    table = EncodeSegment(Text(), OPTIONS)(plan, segment)
    rows = zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True)
    trained = sorted(chr(label) for _, labels in rows for label in labels[1:] if label >= 0)
    assert trained == sorted("bcdefghijklmnop" + "yz")
    assert sum(one is False for row in table["continued"].to_pylist() for one in row) == 2
    assert len({name for row in table["rows"].to_pylist() for name in row}) == 2
    assert len(table["rows"].combine_chunks().flatten()) == 4  # the first text has three pieces
    assert counts(table, 0) == {"nothing to train": 1}


def test_packing_changes_who_shares_a_row_and_nothing_else(tmp_path):
    plan = make_plan(tmp_path, {"a": ["A" * (2 + i % 4) for i in range(20)]}, window=20)
    (segment,) = segments(plan)
    single = EncodeSegment(Letters(), replace(OPTIONS, cutoff=8))(plan, segment)
    packed = EncodeSegment(Letters(), replace(OPTIONS, cutoff=8, packing=True))(plan, segment)
    assert single.num_rows == 20
    assert packed.num_rows <= 10
    for name in ("input_ids", "labels", "rows"):
        assert sorted(x for row in packed[name].to_pylist() for x in row) == sorted(
            x for row in single[name].to_pylist() for x in row
        )
    assert all(len(ids) <= 8 for ids in packed["input_ids"].to_pylist())


BAD = '{"instruction": "Q", "outptu": "B"}\nnot json\n{"instruction": "Q", "output": "GOOD"}\n'


def test_a_bad_row_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    plan = make_plan(tmp_path, {"a": ["A"]})
    path.write_text(BAD.splitlines()[0] + "\n")
    files = locate(str(path))
    plan = replace(plan, sets=(replace(plan.sets[0], files=files),))
    with pytest.raises(RequestError) as refused:
        read_segment(plan, segments(plan)[0], OPTIONS)
    assert refused.value.messages == (
        f"{path}:1: row 1: has no column 'output'; its columns are 'instruction', 'outptu' (read as alpaca)",
    )


def test_an_example_that_the_template_refuses_is_named(tmp_path):
    plan = make_plan(tmp_path, {"a": ["?"]})
    with pytest.raises(RequestError, match=r"a\.jsonl:1: row 1: the template says no"):
        EncodeSegment(Letters(), OPTIONS)(plan, segments(plan)[0])


def test_bad_rows_are_skipped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    plan = make_plan(tmp_path, {"a": ["A"]})
    path.write_text(BAD)
    plan = replace(plan, sets=(replace(plan.sets[0], files=locate(str(path))),))
    (segment,) = segments(plan)
    table = EncodeSegment(Letters(), replace(OPTIONS, on_bad_row="skip"))(plan, segment)
    assert counts(table, 0) == {"cannot be read": 1, "does not fit its format": 1}
    assert len(table["input_ids"]) == 1


def test_a_row_is_trained_on_or_held_out(tmp_path):
    """A copy of a row is on the same side."""
    answers = [f"A{i}" for i in range(300)]
    plan = make_plan(tmp_path, {"a": answers, "b": answers[:40]}, window=400)
    (segment,) = segments(plan)
    sides = {}
    for part in ("train", "held out"):
        items = read_segment(plan, segment, replace(OPTIONS, held_out=0.2, part=part))
        sides[part] = {(item.set, item.example.messages[-1].content) for item in items if item.example}
    assert sides["train"] | sides["held out"] == {(0, a) for a in answers} | {(1, a) for a in answers[:40]}
    assert not sides["train"] & sides["held out"]
    assert 30 < len([1 for number, _ in sides["held out"] if number == 0]) < 90  # 60 +- 7 by chance
    for number, answer in sides["held out"]:
        assert number == 1 or answer not in answers[:40] or (1, answer) in sides["held out"]
