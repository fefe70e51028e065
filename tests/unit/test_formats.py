"""Raw rows and the one standard form: what each format means, and what is refused in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.from_rows import PLAIN, from_alpaca, from_openai, from_sharegpt

from rayloom.data.description import Columns, Description, read_descriptions
from rayloom.data.example import Example, Message, ToolCall
from rayloom.data.formats import FORMATS, detect_format, telling_columns

DEMOS = Path(__file__).parents[3] / "shared" / "data"

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def conversation(*turns: tuple[str, str]) -> Example:
    return Example(tuple(Message(role, text) for role, text in turns))


@st.composite
def examples(draw: st.DrawFn) -> Example:
    system = draw(st.lists(st.tuples(st.just("system"), TEXT.filter(bool)), max_size=1))
    turns = draw(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
    pairs = [turn for question, answer in turns for turn in (("user", question), ("assistant", answer))]
    return conversation(*system, *pairs)


def test_every_format_in_full():
    expected = conversation(
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Add\n1 2"), ("assistant", "3")
    )
    assert expected == from_alpaca(
        {
            "system": "Be brief.",
            "history": [["Hi", "Yes?"]],
            "instruction": "Add",
            "input": "1 2",
            "output": "3",
            "id": 7,
        }
    )
    turns = [("human", "Hi"), ("gpt", "Yes?"), ("human", "Add\n1 2"), ("gpt", "3")]
    listed = [{"from": role, "value": text} for role, text in turns]
    assert expected == from_sharegpt({"conversations": [{"from": "system", "value": "Be brief."}, *listed]})
    assert expected == from_sharegpt({"conversations": listed, "system": "Be brief."})
    assert expected == from_openai({"messages": expected.as_dicts()})
    assert expected == from_openai({"messages": expected.as_dicts()[1:], "system": "Be brief."})


@pytest.mark.parametrize(
    "left_out", [{}, {"input": ""}, {"input": None}, {"system": ""}, {"system": None}, {"history": []}]
)
def test_alpaca_columns_that_may_be_empty(left_out):
    row = {"instruction": "Q", "output": "A", **left_out}
    assert from_alpaca(row) == conversation(("user", "Q"), ("assistant", "A"))


@given(example=examples())
def test_all_formats_say_the_same(example):
    dicts = example.as_dicts()
    assert from_openai({"messages": dicts}) == example
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    assert example == from_sharegpt(
        {"conversations": [{"from": names[item["role"]], "value": item["content"]} for item in dicts]}
    )
    system = [item["content"] for item in dicts if item["role"] == "system"]
    texts = [item["content"] for item in dicts if item["role"] != "system"]
    assert example == from_alpaca(
        {
            "system": system[0] if system else None,
            "history": [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2], strict=True)],
            "instruction": texts[-2],
            "output": texts[-1],
        }
    )


@given(roles=st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=6))
def test_the_order_of_roles(roles):
    """Accepted are exactly: at most one system turn, first; then user and assistant in pairs, at least one pair."""
    turns = roles[1:] if roles[0] == "system" else roles
    right = len(turns) > 0 and turns == ["user", "assistant"] * (len(turns) // 2)
    row = {"messages": [{"role": role, "content": "x"} for role in roles]}
    if right:
        assert [message.role for message in from_openai(row).messages] == roles
    else:
        with pytest.raises(ValueError, match=r"wrong order of roles|ends without an assistant's answer"):
            from_openai(row)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 2)
    | st.text(max_size=2)
    | st.sampled_from(["user", "human", "gpt", "tool", "function_call", "\ud800", '{"name": "f"}', "[]", "[[["]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from("role content from value tool_calls name arguments function train weight".split()),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
COLUMNS = (
    "instruction input output system history conversations messages tools chosen rejected text label image".split()
)
DESCRIPTIONS = [
    PLAIN,
    Description(ranking=True),
    Description(
        columns=Columns.model_validate(
            {name: name for name in COLUMNS if name in Columns.model_fields}
            | {"prompt": "instruction", "response": "output", "kto_tag": "label", "images": "image"}
        )
    ),
]


@given(
    row=st.dictionaries(st.sampled_from(COLUMNS), ANYTHING, max_size=6),
    name=st.sampled_from(sorted(FORMATS)),
    description=st.sampled_from(DESCRIPTIONS),
)
def test_whatever_a_row_holds_it_is_an_example_or_a_value_error(row, name, description):
    detect_format(row, description)
    try:
        example = FORMATS[name](row, description)
    except ValueError:
        return
    if example.text is not None:
        return
    for answer in (example.chosen, example.rejected) if description.ranking else (example.messages,):
        assert answer[-1].role == "assistant"
    messages = example.messages + example.chosen + example.rejected
    assert all(isinstance(message.content, str) for message in messages)
    assert all(isinstance(call.name, str) for message in messages for call in message.tool_calls)


ORDER = "(user and assistant take turns, the user first)"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("alpaca", {"output": "A"}, "has no column 'instruction'; its columns are 'output'"),
        ("alpaca", {"instruction": "Q", "text": "A"}, "has no column 'output'; its columns are 'instruction', 'text'"),
        ("alpaca", {}, "has no column 'instruction'; its columns are none"),
        ("alpaca", {"instruction": 3, "output": "A"}, "column 'instruction' must be text, not 3"),
        ("alpaca", {"instruction": "Q", "output": None}, "column 'output' must be text, not None"),
        ("alpaca", {"instruction": "Q", "output": "A", "input": ["x"]}, "column 'input' must be text, not ['x']"),
        ("alpaca", {"instruction": "Q", "output": "A", "system": 1}, "column 'system' must be text, not 1"),
        ("alpaca", {"instruction": ["x" * 99], "output": "A"}, f"column 'instruction' must be text, not ['{'x' * 58}"),
        (
            "alpaca",
            {"instruction": "Q", "output": "A", "history": 3},
            "column 'history' must be a list of pairs, not 3",
        ),
        (
            "alpaca",
            {"instruction": "Q", "output": "A", "history": [["q", "a"], ["q"]]},
            "column 'history': entry 2 is not a pair of question and answer",
        ),
        (
            "alpaca",
            {"instruction": "Q", "output": "A", "history": [["q", None]]},
            "column 'history': entry 1 is not a pair of question and answer",
        ),
        ("sharegpt", {"messages": []}, "has no column 'conversations'; its columns are 'messages'"),
        ("sharegpt", {"conversations": []}, "column 'conversations' must be a list of turns with at least one turn"),
        ("openai", {"messages": "Hi"}, "column 'messages' must be a list of turns with at least one turn"),
        ("openai", {"messages": None}, "column 'messages' must be a list of turns with at least one turn"),
        ("openai", {"messages": ["Hi"]}, "column 'messages': turn 1 must have 'role' and 'content'"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt"}]},
            "column 'conversations': turn 2 must have 'from' and 'value'",
        ),
        (
            "openai",
            {"messages": [{"role": "human", "content": "Q"}]},
            "column 'messages': turn 1 has the role 'human'; known are user, assistant, tool, system, "
            "developer, function",
        ),
        (
            "openai",
            {"messages": [{"role": ["user"], "content": "Q"}]},
            "column 'messages': turn 1 has the role ['user']; known are user, assistant, tool, system, "
            "developer, function",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "user", "value": "Q"}]},
            "column 'conversations': turn 1 has the role 'user'; known are human, gpt, observation, function_call, "
            "system",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": {"type": "text"}}]},
            "column 'messages': turn 1: 'content' must be text",
        ),
        (
            "openai",
            {"messages": [{"role": "assistant", "content": "A"}]},
            f"wrong order of roles: turn 1 is from the assistant where the user is due {ORDER}",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": "Q"}, {"role": "user", "content": "Q"}]},
            f"wrong order of roles: turn 2 is from the user where the assistant is due {ORDER}",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": "Q"}, {"role": "system", "content": "S"}]},
            f"wrong order of roles: turn 2 is from the system where the assistant is due {ORDER}",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": "Q"}]},
            "ends without an assistant's answer, so there is nothing to learn",
        ),
        (
            "openai",
            {"messages": [{"role": "system", "content": "S"}]},
            "ends without an assistant's answer, so there is nothing to learn",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": "a\ud800"}, {"role": "assistant", "content": "A"}]},
            "a turn of the user is no text: 'utf-8' codec can't encode character '\\ud800' in position 1: "
            "surrogates not allowed",
        ),
    ],
)
def test_what_is_refused(name: str, row: dict[str, Any], message: str):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the whole message is compared)
        FORMATS[name](row, PLAIN)
    assert str(refused.value) == message


def test_what_openai_says_besides():
    add = ToolCall("add", {"a": 1})
    row = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, "brief", {"type": "text", "text": "."}]},
        {"role": "user", "content": [{"type": "text", "text": "1 + 1?", "image_url": None}]},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "add", "content": "2"},
        {"role": "assistant", "content": "Two.", "function_call": None},
    ]
    assert from_openai({"messages": row}).messages == (
        Message("system", "Be brief."),
        Message("user", "1 + 1?"),
        Message("assistant", "", (add,)),
        Message("tool", "2"),
        Message("assistant", "Two."),
    )
    own = Description.model_validate({"format": "openai", "tags": {"user_tag": "developer"}})
    answer = {"role": "assistant", "content": "Hi."}
    renamed = from_openai({"messages": [{"role": "developer", "content": "Hello"}, answer]}, own)
    assert renamed.messages[0].role == "user"
    with pytest.raises(ValueError, match=r"'content': part 1 is .*image.* columns of their own"):
        from_openai({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, answer]})
    with pytest.raises(ValueError, match=r"part 2 is .*parts must be"):
        from_openai({"messages": [{"role": "user", "content": ["a", {"type": "text"}]}, answer]})


def test_formats_are_told_by_their_columns():
    assert detect_format({"instruction": "Q", "output": "A"}) == "alpaca"
    assert detect_format({"id": 1, "conversations": []}) == "sharegpt"
    assert detect_format({"messages": []}) == "openai"
    assert detect_format({"text": "x"}) == "text"
    assert detect_format({"messages": [], "text": "x"}) == "openai"
    assert detect_format({"answer": "x"}) is None
    assert detect_format({}) is None
    assert telling_columns() == (
        "'instruction' (alpaca), 'conversations' (sharegpt), 'messages' (openai), 'text' (text)"
    )


@pytest.mark.parametrize(
    ("row", "description", "name"),
    [
        ({"question": "Q", "answer": "A"}, {"columns": {"prompt": "question", "response": "answer"}}, "alpaca"),
        ({"content": "x"}, {"columns": {"prompt": "content"}}, "text"),
        ({"q": "Q", "chosen": "A"}, {"ranking": True, "columns": {"prompt": "q", "chosen": "chosen"}}, "alpaca"),
        ({"talk": [{"role": "user"}]}, {"columns": {"messages": "talk"}}, "openai"),
        ({"messages": [{"from": "human"}]}, {"columns": {"messages": "messages"}}, "sharegpt"),
        ({"chosen": [{"role": "user"}], "rejected": []}, {"ranking": True}, "openai"),
        ({"chosen": [{"role": "user"}]}, {}, None),
        ({"messages": []}, {"columns": {"messages": "talk"}}, None),
    ],
)
def test_formats_are_told_by_the_columns_of_the_description(row, description, name):
    assert detect_format(row, Description(**description)) == name


def test_prompts_without_answers():
    user, system = Message("user", "Q"), Message("system", "S")
    prompts = Description(prompts_only=True)
    assert FORMATS["alpaca"]({"instruction": "Q"}, prompts) == Example((user,))
    assert FORMATS["alpaca"]({"instruction": "Q", "output": None, "system": "S"}, prompts) == Example((system, user))
    answered = FORMATS["alpaca"]({"instruction": "Q", "output": "A"}, prompts)
    assert answered == FORMATS["alpaca"]({"instruction": "Q", "output": "A"}, PLAIN)
    open_ended = FORMATS["openai"]({"messages": [{"role": "user", "content": "Q"}]}, prompts)
    assert open_ended == Example((user,))
    assert open_ended.without_answer() == (open_ended, "")
    assert answered.without_answer() == (open_ended, "A")
    with pytest.raises(ValueError, match="has no turn that could be answered"):
        FORMATS["openai"]({"messages": [{"role": "system", "content": "S"}]}, prompts)
    with pytest.raises(ValueError, match=r"turn 1 is from the assistant where the user is due"):
        FORMATS["openai"]({"messages": [{"role": "assistant", "content": "A"}]}, prompts)
    named = Description(prompts_only=True, columns=Columns(prompt="question"))
    assert detect_format({"question": "Q"}, named) == "alpaca"
    assert FORMATS["alpaca"]({"question": "Q"}, named) == Example((user,))


def test_plain_text():
    assert FORMATS["text"]({"text": "x", "url": "y"}, PLAIN) == Example(text="x")
    by_prompt = Description(columns=Columns(prompt="content", images="image"))
    assert FORMATS["text"]({"content": "<image>", "image": "a.png"}, by_prompt) == Example(
        text="<image>", images=("a.png",)
    )
    with pytest.raises(ValueError, match="column 'text' must be text, not None"):
        FORMATS["text"]({"text": None}, PLAIN)
    with pytest.raises(ValueError, match="column 'text' is no text: 'utf-8' codec"):
        FORMATS["text"]({"text": "\ud800"}, PLAIN)


def test_columns_that_are_not_named_are_not_read():
    named = Description(columns=Columns(prompt="q", response="a"))
    row = {"q": "Q", "a": "A", "system": "S", "input": "I", "history": 3, "tools": "no JSON"}
    assert from_alpaca(row, named) == conversation(("user", "Q"), ("assistant", "A"))


def rows_of(name: str) -> list[dict[str, Any]]:
    path = DEMOS / name
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".txt":
        return [{"text": line} for line in path.read_text(encoding="utf-8").splitlines()]
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.skipif(not DEMOS.is_dir(), reason=f"no demo data sets in {DEMOS}")
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("alpaca_en_demo", 999),
        ("identity", 91),
        ("glaive_toolcall_en_demo", 300),
        ("dpo_en_demo", 300),
        ("kto_en_demo", 300),
        ("c4_demo", 300),
        ("wiki_demo", 30),
    ],
)
def test_every_row_of_the_demo_sets(name, rows):
    entry = read_descriptions(DEMOS)[name]
    examples = [FORMATS[entry.description.format](row, entry.description) for row in rows_of(Path(entry.address).name)]
    assert len(examples) == rows
    for example in examples:
        assert bool(example.chosen and example.rejected) == (name == "dpo_en_demo")
        assert (example.desirable is not None) == (name == "kto_en_demo")
        assert (example.text is not None) == (name in ("c4_demo", "wiki_demo")) == (not example.messages)
    calls = [call for example in examples for message in example.messages for call in message.tool_calls]
    assert len(calls) == (211 if name == "glaive_toolcall_en_demo" else 0)
    assert all(isinstance(call.arguments, dict) for call in calls)
