"""Raw rows with tools, preferences, judgements, media and flags: how they come into the standard form."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.from_rows import from_alpaca, from_openai, from_sharegpt

from rayloom.data.description import Columns, Description, Tags
from rayloom.data.example import Example, Message, ToolCall
from rayloom.data.formats import FORMATS

CALL = ToolCall("add", {"a": 1})
SCHEMA = {"name": "add", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": SCHEMA}


@pytest.mark.parametrize("tools", [json.dumps([SCHEMA]), [SCHEMA], [WRAPPED], [{"type": "function", **SCHEMA}]])
def test_calls_of_tools(tools):
    """Several tools answer one after another; the call's text may be null."""
    said = [{"from": "human", "value": "1 + ?"}]
    said += [{"from": "function_call", "value": '[{"name": "add", "arguments": {"a": 1}}, {"name": "add"}]'}]
    said += [{"from": "observation", "value": "2"}, {"from": "observation", "value": "3"}]
    said += [{"from": "gpt", "value": "2 or 3"}]
    expected = Example(
        (
            Message("user", "1 + ?"),
            Message("assistant", "", (CALL, ToolCall("add", {}))),
            Message("tool", "2"),
            Message("tool", "3"),
            Message("assistant", "2 or 3"),
        ),
        tools=(WRAPPED,),
    )
    assert from_sharegpt({"conversations": said, "tools": tools}) == expected
    calls = [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"id": "2", "type": "function", "function": {"name": "add", "arguments": ""}},
    ]
    messages = [
        {"role": "user", "content": "1 + ?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "tool", "content": "3", "tool_call_id": "2"},
        {"role": "assistant", "content": "2 or 3", "tool_calls": []},
    ]
    assert from_openai({"messages": messages, "tools": tools}) == expected
    del messages[1]["content"]
    assert from_openai({"messages": messages, "tools": tools}) == expected
    again = [message.as_dict() for message in expected.messages]
    assert from_openai({"messages": again, "tools": list(expected.tools)}) == expected


def test_a_thought_before_a_call_is_the_text_of_the_turn():
    said = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '<think>\nHm.\n</think>\n\n{"name": "add", "arguments": {"a": 1}}'},
    ]
    message = from_sharegpt({"conversations": said}).messages[1]
    assert message == Message("assistant", "<think>\nHm.\n</think>", (CALL,))


@pytest.mark.parametrize(("text", "arguments"), [('{"a": 1}', {"a": 1}), ("[1]", "[1]"), ("{oops", "{oops"), ("", {})])
def test_arguments_as_text(text, arguments):
    call = {"name": "add", "arguments": text}
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "x", "tool_calls": [call]}]
    assert from_openai({"messages": turns}).messages[1].tool_calls == (ToolCall("add", arguments),)


@pytest.mark.parametrize("empty", [{}, {"tools": None}, {"tools": ""}, {"tools": []}, {"tools": "[]"}])
def test_a_row_may_have_no_tools(empty):
    assert from_alpaca({"instruction": "Q", "output": "A", **empty}).tools == ()


def turns(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turn, as OpenAI writes it."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


PAIR = Example((Message("user", "Q"),), chosen=(Message("assistant", "A"),), rejected=(Message("assistant", "B"),))
ANSWERS = [{"role": "assistant", "content": text} for text in "AB"]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("alpaca", {"instruction": "Q", "output": ["A", "B"]}),
        ("alpaca", {"instruction": "Q", "chosen": "A", "rejected": "B"}),
        ("alpaca", {"instruction": "Q", "chosen": "A", "rejected": "B", "output": ["x"]}),
        ("openai", {"messages": turns("Q"), "chosen": "A", "rejected": "B"}),
        ("openai", {"messages": turns("Q"), "chosen": ANSWERS[0], "rejected": ANSWERS[1]}),
        ("openai", {"messages": turns("Q"), "chosen": [ANSWERS[0]], "rejected": [ANSWERS[1]]}),
        ("openai", {"messages": turns("Q"), "chosen": ANSWERS[0], "rejected": "B"}),
        ("openai", {"chosen": turns("Q", "A"), "rejected": turns("Q", "B")}),
        ("openai", {"chosen": turns("Q", "A"), "rejected": turns("Q", "B"), "messages": turns("Q", "A")}),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "A"},
                "rejected": {"from": "gpt", "value": "B"},
            },
        ),
    ],
)
def test_preferences(name, row):
    assert FORMATS[name](row, Description(ranking=True)) == PAIR


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("qaqx", "qaqy", 3),
        ("qaqx", "qbqy", 1),
        ("qx", "qxqy", 1),
        ("qxqx", "qxrx", 1),
        ("qx", "qx", 1),
    ],
)
def test_the_prompt_is_what_both_conversations_begin_with(chosen, rejected, prompt):
    row = {"chosen": turns(*chosen), "rejected": turns(*rejected), "system": "S"}
    example = from_openai(row, Description(ranking=True))
    assert [message.content for message in example.messages] == ["S", *chosen[:prompt]]
    assert [message.content for message in example.chosen] == list(chosen[prompt:])
    assert [message.content for message in example.rejected] == list(rejected[prompt:])


@pytest.mark.parametrize("tag", [True, False, 1, 0])
def test_judged_answers(tag):
    columns = Columns(prompt="instruction", response="output", messages="messages", kto_tag="label")
    by_alpaca = from_alpaca({"instruction": "Q", "output": "A", "label": tag}, Description(columns=columns))
    assert by_alpaca == from_openai({"messages": turns("Q", "A"), "label": tag}, Description(columns=columns))
    assert by_alpaca.desirable is bool(tag)


@pytest.mark.parametrize(
    ("images", "expected"), [(None, ()), ("a", ("a",)), ([], ()), (["a", {"b": 1}], ("a", {"b": 1}))]
)
def test_images_videos_and_audios(images, expected):
    description = Description(columns=Columns(messages="messages", images="i", videos="v", audios="a"))
    example = from_openai({"messages": turns("Q", "A"), "i": images, "v": "v", "a": ["x", "y"]}, description)
    assert (example.images, example.videos, example.audios) == (expected, ("v",), ("x", "y"))
    assert from_openai({"messages": turns("Q", "A")}, description).images == ()


@pytest.mark.parametrize(
    ("flags", "train"),
    [
        ({}, None),
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"weight": None, "train": None}, None),
        ({"train": False}, False),
        ({"train": True}, True),
    ],
)
def test_a_turn_says_whether_it_is_learnt(flags, train):
    row = {"messages": [*turns("Q"), {**ANSWERS[0], **flags}]}
    assert from_openai(row).messages == (Message("user", "Q"), Message("assistant", "A", train=train))


def test_tags_name_the_roles():
    tags = Tags(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")
    row = {"messages": [*turns("Q", "A"), {"role": "observation", "content": "O"}, ANSWERS[1]]}
    description = Description(format="sharegpt", columns=Columns(messages="messages"), tags=tags)
    assert [message.role for message in from_sharegpt(row, description).messages] == (
        "user assistant tool assistant".split()
    )


RANKED = {"ranking": True}
JUDGED = {"columns": {"messages": "messages", "prompt": "instruction", "response": "output", "kto_tag": "label"}}
WITH_IMAGES = {"columns": {"messages": "messages", "images": "images"}}


def called(value: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": value}]}


def calling(calls: Any, role: str = "assistant") -> dict[str, Any]:
    return {"messages": [*turns("Q"), {"role": role, "content": None, "tool_calls": calls}]}


@pytest.mark.parametrize(
    ("name", "row", "description", "message"),
    [
        ("alpaca", {"instruction": "Q", "output": ["A"]}, RANKED, "column 'output' must be a list of two texts, the "),
        ("alpaca", {"instruction": "Q", "output": "A"}, RANKED, "has no column 'chosen'; its columns are 'instruction"),
        (
            "alpaca",
            {"instruction": "Q", "chosen": "A", "rejected": None},
            RANKED,
            "column 'rejected' must be text, not",
        ),
        ("alpaca", {"instruction": "Q", "output": "A"}, JUDGED, "has no column 'label'; its columns are 'instruction'"),
        (
            "alpaca",
            {"instruction": "Q", "output": "A", "label": None},
            JUDGED,
            "column 'label' must be true or false, ",
        ),
        (
            "alpaca",
            {"instruction": "Q", "output": "A", "label": "no"},
            JUDGED,
            "column 'label' must be true or false, ",
        ),
        (
            "alpaca",
            {"instruction": "Q", "output": "A", "tools": "x"},
            {},
            "column 'tools' is not JSON: Expecting value",
        ),
        (
            "alpaca",
            {"instruction": "Q", "output": "A", "tools": ["x"]},
            {},
            "column 'tools' must be a list of functions",
        ),
        ("openai", {"messages": turns("Q"), "chosen": "A"}, RANKED, "has no column 'rejected'; its columns are "),
        ("openai", {"messages": turns("Q"), "chosen": "A", "rejected": 3}, RANKED, "column 'rejected' must be text, a"),
        ("openai", {"chosen": "A", "rejected": "B"}, RANKED, "has no column 'messages'; its columns are 'chosen', "),
        (
            "openai",
            {"messages": turns("Q", "A"), "chosen": "A", "rejected": "B"},
            RANKED,
            "with the better answer: wrong",
        ),
        (
            "openai",
            {"messages": turns("Q"), "chosen": "A", "rejected": turns("Q")[0]},
            RANKED,
            "with the worse answer: ",
        ),
        (
            "openai",
            {"messages": turns("Q"), "chosen": {"role": "x"}, "rejected": ""},
            RANKED,
            "column 'chosen': the turn",
        ),
        (
            "openai",
            {"chosen": turns("Q", "A"), "rejected": turns("R", "B")},
            RANKED,
            "columns 'chosen' and 'rejected' ",
        ),
        (
            "openai",
            {"messages": turns("Q", "A"), "images": ["a", None]},
            WITH_IMAGES,
            "column 'images': entry 2 is empty",
        ),
        (
            "openai",
            {"messages": [*turns("Q"), {**ANSWERS[0], "weight": 2}]},
            {},
            "column 'messages': turn 2: 'weight' m",
        ),
        (
            "openai",
            {"messages": [*turns("Q"), {**ANSWERS[0], "train": "y"}]},
            {},
            "column 'messages': turn 2: 'train' m",
        ),
        ("openai", calling([{"name": 3}]), {}, "column 'messages': turn 2: a function call must have 'name' and "),
        ("openai", calling({"name": "f"}), {}, "column 'messages': turn 2: the function calls must be a list of at "),
        (
            "openai",
            calling([{"name": "f", "arguments": [1]}]),
            {},
            "column 'messages': turn 2: the arguments of 'f' must",
        ),
        ("openai", calling([{"name": "f"}], "user"), {}, "column 'messages': turn 2: 'tool_calls' of the user; only "),
        ("openai", calling([{"name": "f", "arguments": {"x": "\ud800"}}]), {}, "a call of a tool is no text: 'utf-8' "),
        (
            "openai",
            {"messages": [*turns("Q"), {"role": "tool", "content": "x"}]},
            {},
            "wrong order of roles: turn 2 is ",
        ),
        (
            "openai",
            {"messages": [{"role": "tool", "content": "x"}, ANSWERS[0]]},
            {},
            "wrong order of roles: turn 1 is ",
        ),
        (
            "openai",
            {"messages": [*turns("Q"), {"role": "assistant", "content": None}]},
            {},
            "column 'messages': turn 2: ",
        ),
        ("sharegpt", called("add(1)"), {}, "column 'conversations': turn 2: the function call is not JSON: Expecting "),
        ("sharegpt", called("[" * 100_000), {}, "column 'conversations': turn 2: the function call is not JSON: "),
        (
            "sharegpt",
            called("[]"),
            {},
            "column 'conversations': turn 2: the function calls must be a list of at least ",
        ),
        ("sharegpt", called('"add"'), {}, "column 'conversations': turn 2: a function call must have 'name' and "),
    ],
)
def test_what_is_refused_of_tools_preferences_judgements_and_media(name, row, description, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the message is compared)
        FORMATS[name](row, Description.model_validate(description))
    assert str(refused.value).startswith(message)
