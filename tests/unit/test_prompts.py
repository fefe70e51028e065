"""Prompts of stage ppo: the tokenizer's own generation prompt, the data's answer beside it, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rayloom.config.job import JobConfig
from rayloom.data.example import Example, Message
from rayloom.data.plan import Position
from rayloom.data.segment import EncodeSegment
from rayloom.data.walk import Walk
from rayloom.stages.ppo import PromptEncoder
from rayloom.stages.prepare import prepare_data, segment_options

TURNS = (
    Message("system", "be brief"),
    Message("user", "one"),
    Message("assistant", "two"),
    Message("user", "three"),
    Message("assistant", "four"),
)


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> JobConfig:
    rows = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "name": "prompts",
        "output_dir": str(tmp_path),
        "model": {"path": str(tiny_model)},
        "data": {"train": [str(tmp_path / "a.jsonl")], "cutoff": 64, "window": 8},
        "stage": {"type": "ppo"},
    }
    return JobConfig.model_validate(document)


@pytest.fixture
def encoder(job: JobConfig) -> PromptEncoder:
    made = prepare_data(job)[1]
    assert isinstance(made, PromptEncoder)
    return made


def test_a_prompt_is_the_tokenizers_own(encoder: PromptEncoder, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (found,) = encoder.encode([Example(TURNS)], 200)
    messages = [message.as_dict() for message in TURNS[:-1]]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found.input_ids == expected
    assert found.answer == "four"
    assert found.fault is None
    assert found.cut == 0


def test_of_a_preference_the_chosen_answer_is_the_datas(encoder: PromptEncoder) -> None:
    pair = Example(TURNS[:2], chosen=(Message("assistant", "good"),), rejected=(Message("assistant", "bad"),))
    (found,) = encoder.encode([pair], 200)
    (same,) = encoder.encode([Example((*TURNS[:2], Message("assistant", "good")))], 200)
    assert (found.input_ids, found.answer) == (same.input_ids, "good")


def test_too_long_prompts_lose_their_oldest_turns_and_then_are_left_out(encoder: PromptEncoder) -> None:
    (whole,) = encoder.encode([Example(TURNS)], 200)
    shorter = Example((TURNS[0], *TURNS[3:]))
    (without,) = encoder.encode([shorter], 200)
    (cut,) = encoder.encode([Example(TURNS)], len(whole.input_ids) - 1)
    assert cut.input_ids == without.input_ids
    assert cut.cut == len(whole.input_ids) - len(without.input_ids)
    assert cut.messages_cut == 2
    (nothing,) = encoder.encode([Example(TURNS)], len(without.input_ids) - 1)
    assert nothing.input_ids == []
    assert nothing.cut == len(whole.input_ids)


def test_plain_text_asks_nothing(encoder: PromptEncoder) -> None:
    (found,) = encoder.encode([Example(text="once upon a time")], 200)
    assert found.fault == "the row is plain text; stage ppo answers the prompts of conversations"


def test_rows_of_the_stream_carry_the_datas_answer(job: JobConfig) -> None:
    plan, encoder = prepare_data(job)
    segment, _ = Walk(plan).step(Position())
    table = EncodeSegment(encoder, segment_options(job))(plan, segment)
    numbers = [rows[0] & 0xFFFFFFFF for rows in table["rows"].to_pylist()]
    assert table["answer"].to_pylist() == [f"answer {number}" for number in numbers]
    assert len(set(numbers)) == table.num_rows == 8
