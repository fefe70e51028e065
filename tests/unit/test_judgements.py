"""Judged answers from rows to token rows: the judgement, and each prompt with another example's answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.chat import own_ids

from rayloom.config.job import JobConfig
from rayloom.data.encoding import IGNORED
from rayloom.data.example import Example, Message
from rayloom.data.mismatch import with_mismatches
from rayloom.data.plan import Position, Segment
from rayloom.data.rows import Encoded, second_start, segment_table
from rayloom.data.template_library import library_template
from rayloom.errors import RequestError
from rayloom.models.text_tokenizer import TokenizerState
from rayloom.stages.kto import JudgementEncoder
from rayloom.stages.rules import check_stage
from rayloom.train.meter import BatchCount
from rayloom.train.pairs import first_sequences, sides_of

CHATML = library_template("chatml")


def judged(question: str, answer: str, desirable: bool | None = True, **more: Any) -> Example:
    earlier = (Message("user", "river?"), Message("assistant", "stone", train=True))
    return Example((*earlier, Message("user", question), Message("assistant", answer)), desirable=desirable, **more)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> JudgementEncoder:
    assert CHATML is not None
    return JudgementEncoder(TokenizerState.of(tokenizer), CHATML)


def test_the_last_answer_is_what_was_judged(tokenizer, encoder):
    example = judged("lamp?", "cloud seven", desirable=False)
    (encoding,) = encoder.encode([example], 200)
    assert encoding.input_ids == own_ids(tokenizer, example, CHATML)
    assert encoding.desirable is False
    assert tokenizer.decode([label for label in encoding.labels if label != IGNORED]) == "cloud seven<|im_end|>"


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (judged("lamp?", "cloud", None), "the row is a conversation; stage kto learns from answers that were judged"),
        (Example(text="river"), "the row is plain text"),
        (Example((Message("user", "a"),), chosen=(Message("assistant", "b"),)), "a preference (stage dpo)"),
        (judged("lamp?", "cloud", images=("x",)), "has images"),
    ],
)
def test_what_nobody_judged(encoder, example, message):
    refused, kept = encoder.encode([example, judged("lamp?", "cloud")], 200)
    assert kept.desirable is True
    assert message in refused.fault


def encoded(prompt: list[int], answer: list[int], number: int, desirable: bool = True) -> Encoded:
    return Encoded([*prompt, *answer], [IGNORED] * len(prompt) + answer, 0, number, desirable=desirable)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6), st.integers(8, 14))
def test_each_prompt_meets_the_next_answer(sizes, cutoff):
    prompts = [list(range(100 * n, 100 * n + size)) for n, (size, _) in enumerate(sizes, 1)]
    answers = [list(range(1000 * n, 1000 * n + size)) for n, (_, size) in enumerate(sizes, 1)]
    examples = [encoded(*both, number) for number, both in enumerate(zip(prompts, answers, strict=True))]
    made = with_mismatches(examples, cutoff)
    for number, one in enumerate(made):
        own = examples[number]
        if len(sizes) == 1:
            assert one == own
            continue
        assert one.input_ids[: one.border] == own.input_ids
        assert one.labels[: one.border] == own.labels
        other = answers[(number + 1) % len(answers)][: cutoff - len(prompts[number])]
        assert one.input_ids[one.border :] == prompts[number] + other
        assert one.labels[one.border :] == [IGNORED] * len(prompts[number]) + other
        assert one.row == number


def test_rows_of_judged_answers():
    examples = [encoded([1, 2], [3], 0, True), encoded([4], [5, 6], 1, False), encoded([7, 8], [9], 2, True)]
    none = np.empty(0, dtype=np.int64)
    segment = Segment(Position(), none, none, none, 0.0, 1.0)
    table = segment_table(segment, with_mismatches(examples, 16), [], capacity=None, seed=0)
    by_row = {row["rows"][0]: row for row in table.to_pylist()}
    assert [by_row[number]["desirable"] for number in range(3)] == [1, 0, 1]
    assert by_row[1]["input_ids"] == [4, 5, 6, 4, 9]
    assert second_start(np.array(by_row[1]["position_ids"])) == 3
    first, second = first_sequences(table).to_pylist(), sides_of(table)[1].to_pylist()
    order = [row["rows"][0] for row in table.to_pylist()]
    assert [row["input_ids"] for row in first] == [examples[number].input_ids for number in order]
    assert second[order.index(2)]["input_ids"] == [7, 8, 3]
    count = BatchCount(1)
    count.add(table)
    assert count.numbers[1] == 4  # answers behind their own prompts; the others are not trained


def job(**parts: Any) -> JobConfig:
    return JobConfig.model_validate({"name": "a", "model": {"path": "m"}, "data": {"train": ["x.jsonl"]}, **parts})


def test_bad_input():
    with pytest.raises(
        RequestError, match=r"stage.type: kto compares with the model with its adapter off, and there is none; say"
    ):
        check_stage(job(stage={"type": "kto"}, method={"type": "full"}))
    with pytest.raises(RequestError, match=r"head_learning_rate: optimizer badam has one rate for all; leave it out"):
        check_stage(job(stage={"type": "reward", "head_learning_rate": 1e-3}, optimizer={"type": "badam"},
                        method={"type": "full"}))  # fmt: skip
    with pytest.raises(RequestError, match=r"moe_aux_loss: stage reward adds no router's loss"):
        check_stage(job(stage={"type": "reward"}, model={"path": "m", "moe_aux_loss": 0.1}))
    with pytest.raises(ValueError, match="greater than 0"):
        job(stage={"type": "kto", "desirable_weight": 0})
