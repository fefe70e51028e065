"""`rayloom data preview` and the numbers under it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rayloom.config.job import JobConfig
from rayloom.data.encoding import Encoding
from rayloom.data.example import Example
from rayloom.data.index import make_plan
from rayloom.data.plan import Position
from rayloom.data.rows import DROP_REASONS, TOKENS_CUT, Encoded
from rayloom.data.sample import Sample, histogram, measure_lengths, take_sample
from rayloom.data.segment import EncodeSegment, SegmentOptions, read_segment
from rayloom.data.walk import Walk
from rayloom.errors import RequestError
from rayloom.stages.prepare import prepare_data
from rayloom.stages.preview import preview, spans_of, visible


def write_rows(path: Path, answers: Sequence[str]) -> Path:
    rows = [{"instruction": f"question {n}", "input": "", "output": answer} for n, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_job(model: Path, sets: Sequence[Any], **parts: Any) -> JobConfig:
    data = {"train": list(sets), "cutoff": 64, "window": 16, **parts.pop("data", {})}
    return JobConfig.model_validate({"name": "p", "model": {"path": str(model)}, "data": data, **parts})


def shown(job: JobConfig, rows: int, **options: Any) -> str:
    file = io.StringIO()
    preview(job, rows, Console(file=file, **{"width": 100, **options}))
    return file.getvalue()


class WordEncoder:
    """One token a word; the words of the answers are trained."""

    splits = False

    def key(self) -> str:
        return "words"

    def encode(self, examples: Sequence[Example], cutoff: int) -> list[Encoding]:
        encoded = []
        for example in examples:
            labels = [
                n if m.role == "assistant" else -100 for m in example.messages for n in range(len(m.content.split()))
            ]
            kept = labels[:cutoff]
            encoded.append(Encoding(list(range(len(kept))), kept, len(labels) - len(kept)))
        return encoded


def options(cutoff: int) -> SegmentOptions:
    return SegmentOptions(cutoff, packing=True)


# --- the sample -----------------------------------------------------------------------------------------------------


def sample_of(
    path: Path, answers: Sequence[str], *, cutoff: int = 8, window: int = 4, first: int = 0, size: int = 2000
) -> Sample:
    job = make_job(path, [str(write_rows(path / "a.jsonl", answers))], data={"window": window})
    plan = make_plan(job.data, seed=1, epochs=1)
    return take_sample(plan, WordEncoder(), options(cutoff), first=first, size=size)


def test_the_sample_counts_what_the_stream_drops_and_packs(tmp_path: Path) -> None:
    answers = ["a b c"] * 5 + ["", "w " * 50, "w " * 7]
    job = make_job(tmp_path, [str(write_rows(tmp_path / "a.jsonl", answers))], data={"window": 4})
    plan = make_plan(job.data, seed=1, epochs=1)
    sample = take_sample(plan, WordEncoder(), options(12), first=0)
    work = EncodeSegment(WordEncoder(), options(12))
    tables = [work(plan, segment) for segment in Walk(plan).segments(Position())]
    counts = [sum(numbers) for numbers in zip(*(table["counts"][0].as_py() for table in tables), strict=True)]
    dropped = [sum(example.dropped == reason for example in sample.examples) for reason in range(len(DROP_REASONS))]
    assert dropped == counts[: len(DROP_REASONS)]
    assert sum(dropped) == 1
    assert [example.cut for example in sample.examples if example.cut] == [40]
    assert counts[TOKENS_CUT] == 40
    assert sample.packed_rows == sum(table.num_rows for table in tables)
    assert sample.kept_tokens == sum(len(ids) for table in tables for ids in table["input_ids"].to_pylist())
    assert len(sample.kept) == 7
    assert sample.is_whole


def test_the_first_examples_are_those_of_the_stream(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [f"answer {n}" for n in range(20)])
    plan = make_plan(make_job(tmp_path, [str(path)], data={"window": 4}).data, seed=3, epochs=1)
    sample = take_sample(plan, WordEncoder(), options(99), first=6)
    stream = [item.row for s in Walk(plan).segments(Position()) for item in read_segment(plan, s, options(99))]
    assert [example.row for example in sample.first] == stream[:6]
    assert not sample.is_whole or len(sample.examples) == 20


def test_the_sample_ends_with_the_segment_that_fills_it_and_cuts_a_large_one(tmp_path: Path) -> None:
    answers = ["a"] * 30
    assert len(sample_of(tmp_path, answers, window=4, size=10).examples) == 12
    assert len(sample_of(tmp_path, answers, window=100, size=10).examples) == 10
    assert len(sample_of(tmp_path, answers, window=4).examples) == 30
    assert len(sample_of(tmp_path, answers, window=4, size=4, first=9).first) == 9


def test_order_statistics_are_by_nearest_rank() -> None:
    lengths = measure_lengths(list(range(1, 101)))
    assert (lengths.smallest, lengths.median, lengths.p95, lengths.largest) == (1, 50, 95, 100)
    assert measure_lengths([7]) == measure_lengths([7, 7, 7])


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=80), st.integers(8, 3000))
def test_the_histogram_holds_every_length_once_and_breaks_at_the_cutoff(lengths: list[int], cutoff: int) -> None:
    bins = histogram(lengths, cutoff)
    assert sum(item.count for item in bins) == len(lengths)
    assert sum(item.count for item in bins if item.start > cutoff) == sum(length > cutoff for length in lengths)
    assert all(before.stop is not None and before.stop + 1 == after.start for before, after in pairwise(bins))
    assert bins[0].start == 1
    assert len(bins) <= 14


def test_bins_divide_the_cutoff_where_that_is_near() -> None:
    assert {(item.start - 1) % 32 for item in histogram(list(range(1, 300)), 256)} == {0}


# --- the text -------------------------------------------------------------------------------------------------------


def test_spans_are_the_text_in_order_and_tell_the_trained_and_the_special(
    tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    job = make_job(tiny_model, [str(write_rows(tmp_path / "a.jsonl", ["näïve 日本 🎉"]))], data={"cutoff": 512})
    plan, encoder = prepare_data(job)
    (example,) = take_sample(plan, encoder, options(512), first=1).first
    spans = list(spans_of(example, tokenizer, 512))
    whole = "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\nnäïve 日本 🎉<|im_end|>\n"
    assert "".join(text for text, _, _ in spans) == whole
    assert "".join(text for text, trained, _ in spans if trained) == "näïve 日本 🎉<|im_end|>"
    assert [text for text, _, special in spans if special] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    ]


def test_a_character_over_two_spans_goes_with_the_later(tokenizer: Any) -> None:
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    spans = list(spans_of(Encoded(ids, [-100, ids[1]], 0, 0), tokenizer, 9))
    assert spans == [("", False, False), ("é", True, False)]


def test_control_characters_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[2Jb\tc\nd\u202ee") == "a<U+001B>[2Jb\tc\nd<U+202E>e"


def test_without_colour_trained_stretches_stand_between_marks(tiny_model: Path, tmp_path: Path) -> None:
    job = make_job(tiny_model, [str(write_rows(tmp_path / "greetings.jsonl", ["hello [bold]you[/bold]"]))])
    text = shown(job, 1)
    assert "\x1b" not in text
    assert "greetings, row 0:0" in text
    assert "<|im_start|>assistant\n⟦hello [bold]you[/bold]<|im_end|>⟧\n" in text
    no_color = shown(job, 1, force_terminal=True, color_system="standard", no_color=True)
    assert "⟦" in no_color


def test_with_colour_there_are_no_marks(tiny_model: Path, tmp_path: Path) -> None:
    job = make_job(tiny_model, [str(write_rows(tmp_path / "a.jsonl", ["hello"]))])
    text = shown(job, 1, force_terminal=True, color_system="standard")
    assert "⟦" not in text
    assert "\x1b[32mhello\x1b[0m" in text
    assert "\x1b[1;32m<|im_end|>\x1b[0m" in text


def test_an_example_above_the_cutoff_is_cut_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    job = make_job(tiny_model, [str(write_rows(tmp_path / "a.jsonl", ["ja", "word " * 100]))])
    text = shown(job, 2)
    assert "64 tokens" in text
    table = next(line.split() for line in text.splitlines() if line.split()[:2] == ["a", "2"])
    assert table[-2:] == ["1", "0"]  # one is cut, none is left out


# --- the tables -----------------------------------------------------------------------------------------------------


def test_the_tables_hold_the_mix_and_the_measured_numbers(tiny_model: Path, tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", ["yes"] * 30)
    b = write_rows(tmp_path / "b.jsonl", ["no"] * 10 + ["word " * 100] * 20)
    job = make_job(
        tiny_model,
        [{"path": str(a), "weight": 3}, {"path": str(b), "weight": 1}],
        data={"mix": "interleave_under"},
        train={"workers": 2, "batch_size": 2},
    )
    text = shown(job, 0)
    plan, encoder = prepare_data(job)
    sample = take_sample(plan, encoder, options(64), first=0)
    counts = plan.estimated_mixture().counts(plan.estimated_epoch_length)
    lines = {tuple(line.split()) for line in text.splitlines()}
    assert ("a", "alpaca", "30", str(counts[0]), "75.0", "%", "1.00") in lines
    assert ("b", "alpaca", "30", str(counts[1]), "25.0", "%", f"{counts[1] / 30:.2f}") in lines
    assert f"all {sum(counts)} examples of an epoch, cutoff 64" in text
    too_long = sum(example.cut > 0 for example in sample.examples)
    assert too_long > 0
    assert any(line[:2] == ("b", str(counts[1])) and line[-2:] == (str(too_long), "0") for line in lines)
    assert f"packing makes {sample.packed_rows} rows of 64 tokens" in text
    assert f"at 4 a step, about {round(sample.packed_rows / 4)} steps" in text
    assert "65 and more" in text


def test_a_part_of_the_epoch_is_called_a_part(tiny_model: Path, tmp_path: Path) -> None:
    job = make_job(tiny_model, [str(write_rows(tmp_path / "a.jsonl", ["yes"] * 2600))], data={"window": 512})
    assert "the first 2,048 of 2,600 examples of an epoch" in shown(job, 0)


def test_packing_off_says_what_packing_would_do(tiny_model: Path, tmp_path: Path) -> None:
    job = make_job(tiny_model, [str(write_rows(tmp_path / "a.jsonl", ["yes"] * 8))], data={"packing": False})
    text = shown(job, 0)
    assert "packing is off" in text
    assert "with packing, 8 examples would make" in text


def test_nothing_to_train_on_is_said(tiny_model: Path, tmp_path: Path) -> None:
    job = make_job(tiny_model, [str(write_rows(tmp_path / "a.jsonl", ["word"] * 3))], data={"cutoff": 8})
    assert "the job would be refused" in shown(job, 1)


def test_no_line_is_wider_than_eighty_columns(tiny_model: Path, tmp_path: Path) -> None:
    names = ["a" * 60, "a_set_with_a_long_name"]
    sets = [
        {"path": str(write_rows(tmp_path / f"{n}.jsonl", ["yes"] * 1199 + ["word " * 900])), "name": name}
        for n, name in enumerate(names)
    ]
    text = shown(make_job(tiny_model, sets), 0, width=80)
    tables = text.partition("\nRows")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "a_set_with_a_long_name" in text
    assert "1,200" in text


def test_a_wrong_request_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such data file"):
        shown(make_job(tiny_model, [str(tmp_path / "missing.jsonl")]), 1)
