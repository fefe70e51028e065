"""What is longer than the cutoff: whole turns go first, then the longest text; what must stay stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.chat import own_ids, renderer_of
from transformers import AutoTokenizer

from rayloom.data.encode import encode_conversations
from rayloom.data.encoding import IGNORED, Encoding
from rayloom.data.example import Example, Message, ToolCall
from rayloom.data.spans import FixedTokens
from rayloom.data.template import Rendered
from rayloom.data.template_library import library_template
from rayloom.data.truncate import cut_texts, turn_starts, without_turns
from rayloom.models.text_tokenizer import TokenizerState

TEMPLATES = ["chatml", "qwen3", "llama2", "gemma", "vicuna", "glm4", "mistral"]
WORDS = st.text(st.sampled_from("ab cé日👩 \n"), max_size=40)


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    system = [Message("system", draw(WORDS))] if draw(st.booleans()) else []
    turns: list[Message] = []
    for _ in range(draw(st.integers(1, 5))):
        turns += [Message("user", draw(WORDS)), Message("assistant", draw(WORDS))]
    return Example((*system, *turns))


def is_part_of(part: list[int], whole: list[int]) -> bool:
    """Whether `part` is `whole` with tokens left out."""
    rest = iter(whole)
    return all(token in rest for token in part)


def encode(tokenizer: Any, template: str, example: Example, cutoff: int) -> Encoding:
    (encoding,) = encode_conversations(renderer_of(tokenizer, template), [example], cutoff)
    return encoding


# --- the pure rules --------------------------------------------------------------------------------------------------


def roles(text: str) -> list[Message]:
    names: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [Message(names[letter], letter + str(index)) for index, letter in enumerate(text)]


@pytest.mark.parametrize(
    ("messages", "starts"),
    [
        ("", []),
        ("s", []),
        ("ua", [0]),
        ("sua", [1]),
        ("suaua", [1, 3]),
        ("suatauatata", [1, 5]),
        ("uuaua", [0, 3]),
        ("ata", [0]),
    ],
)
def test_a_turn_begins_with_the_user(messages, starts):
    assert turn_starts(roles(messages)) == starts


def test_without_turns():
    example = Example(tuple(roles("suatauaua")))
    assert without_turns(example, 0) == example
    assert without_turns(example, 1).messages == example.messages[:1] + example.messages[5:]
    assert without_turns(example, 2).messages == example.messages[:1] + example.messages[7:]


@pytest.mark.parametrize(
    ("lengths", "cutoff", "kept"),
    [
        ((3000, 2000), 1000, (500, 500)),
        ((1000, 100), 1000, (900, 100)),
        ((100, 1000), 1000, (100, 900)),
        ((10, 10), 1000, (10, 10)),
        ((5, 9, 7), 15, (5, 5, 5)),
        ((1, 9, 7), 15, (1, 7, 7)),
        ((4, 4), 2, (1, 1)),
        ((4, 4), 1, None),
    ],
)
def test_the_longest_text_is_cut(lengths, cutoff, kept):
    ids, parts = [], []
    for number, length in enumerate(lengths):
        parts.append(list(range(len(ids), len(ids) + length)))
        ids += [number] * length
    cut = cut_texts(Rendered(ids, [True] * len(ids)), parts, cutoff)
    assert (cut and tuple(cut.input_ids.count(number) for number in range(len(lengths)))) == kept


@given(
    data=st.data(), lengths=st.lists(st.integers(0, 9), max_size=5), fixed=st.integers(0, 5), cutoff=st.integers(0, 40)
)
def test_as_much_as_fits_is_kept(data, lengths, fixed, cutoff):
    order = data.draw(st.permutations([n for n, length in enumerate(lengths) for _ in range(length)] + [-1] * fixed))
    parts = [[place for place, owner in enumerate(order) if owner == n] for n in range(len(lengths))]
    parts = [part for part in parts if part]
    rendered = Rendered(list(range(len(order))), [owner == -1 for owner in order])
    cut = cut_texts(rendered, parts, cutoff)
    if cut is None:
        assert fixed + len(parts) > cutoff
        return
    assert len(cut.input_ids) <= cutoff
    assert is_part_of(cut.input_ids, rendered.input_ids)
    assert cut.trained == [rendered.trained[token] for token in cut.input_ids]
    kept = [[place for place in part if place in cut.input_ids] for part in parts]
    assert all(some == part[: len(some)] and some for some, part in zip(kept, parts, strict=True))
    assert sum(cut.trained) == fixed
    shortened = [len(some) for some, part in zip(kept, parts, strict=True) if len(some) < len(part)]
    assert len(set(shortened)) <= 1  # those that were cut have one length, which no other exceeds
    assert all(len(some) <= shortened[0] for some in kept if shortened)
    assert len(cut.input_ids) > cutoff - max(1, len(shortened)) or not shortened


# --- whole conversations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
@given(example=conversations(), cutoff=st.integers(8, 400))
def test_what_is_kept(tokenizer, name, example, cutoff):
    template = library_template(name)
    whole = own_ids(tokenizer, example, template)
    encoding = encode(tokenizer, template, example, cutoff)
    assert encoding.fault is None
    assert encoding.cut == len(whole) - len(encoding.input_ids)
    assert len(encoding.input_ids) <= cutoff
    assert all(label in (token, IGNORED) for token, label in zip(encoding.input_ids, encoding.labels, strict=True))
    if len(whole) <= cutoff:
        assert encoding.input_ids == whole
        assert (encoding.cut, encoding.messages_cut) == (0, 0)
        return
    count = len(turn_starts(example.messages))
    shorter = [own_ids(tokenizer, without_turns(example, number), template) for number in range(count)]
    fitting = [number for number, ids in enumerate(shorter) if len(ids) <= cutoff]
    if fitting:  # the fewest turns are dropped, and the rest is what the template makes of it
        assert encoding.input_ids == shorter[fitting[0]]
        assert encoding.messages_cut == 2 * fitting[0]
    elif encoding.input_ids:  # the last turn, without some of its words
        assert is_part_of(encoding.input_ids, shorter[-1])
        assert encoding.messages_cut == 2 * (count - 1)
        assert any(label != IGNORED for label in encoding.labels[1:])
        end = [label for label in encoding.labels if label != IGNORED][-1]
        assert (
            end == [token for token in shorter[-1] if tokenizer.decode([token]).strip() or True][shorter[-1].index(end)]
        )


@given(example=conversations(), cutoff=st.integers(8, 400))
def test_the_end_of_turn_and_the_marks_stay(tokenizer, example, cutoff):
    encoding = encode(tokenizer, library_template("chatml"), example, cutoff)
    if not encoding.input_ids:
        return
    text = tokenizer.decode(encoding.input_ids)
    roles_kept = ["system" for message in example.messages if message.role == "system" and message.content]
    roles_kept += [message.role for message in example.messages if message.role != "system"][encoding.messages_cut :]
    assert [part.split("\n")[0] for part in text.split("<|im_start|>")[1:]] == roles_kept
    assert text.count("<|im_end|>") == len(roles_kept)
    answers = tokenizer.decode([label for label in encoding.labels if label != IGNORED])
    assert answers.endswith("<|im_end|>")
    assert "\ufffd" not in text  # no character is cut in two


@given(batch=st.lists(conversations(), max_size=5), cutoff=st.integers(8, 200))
def test_a_batch_is_its_examples_one_by_one(tokenizer, batch, cutoff):
    renderer = renderer_of(tokenizer, tokenizer.chat_template)
    alone = [encode_conversations(renderer, [example], cutoff)[0] for example in batch]
    assert encode_conversations(renderer, batch, cutoff) == alone


def test_golden(tokenizer):
    example = Example((*roles("suaua")[:-1], Message("assistant", "z" * 26)))
    whole = encode(tokenizer, library_template("chatml"), example, 1000)
    shorter = encode(tokenizer, library_template("chatml"), example, len(whole.input_ids) - 1)
    assert tokenizer.decode(shorter.input_ids) == (
        "<|im_start|>system\ns0<|im_end|>\n<|im_start|>user\nu3<|im_end|>\n"
        "<|im_start|>assistant\nzzzzzzzzzzzzzzzzzzzzzzzzzz<|im_end|>\n"
    )
    assert shorter.messages_cut == 2
    least = encode(tokenizer, library_template("chatml"), example, len(shorter.input_ids) - 20)
    assert tokenizer.decode(least.input_ids) == (
        "<|im_start|>system\ns0<|im_end|>\n<|im_start|>user\nu3<|im_end|>\n<|im_start|>assistant\nzzzzzz<|im_end|>\n"
    )
    assert least.cut == len(whole.input_ids) - len(least.input_ids)
    none = encode(tokenizer, library_template("chatml"), example, 8)
    assert none == Encoding([], [], cut=len(whole.input_ids))


def test_tool_calls_and_what_belongs_to_them_are_kept_or_dropped_together(tokenizer):
    call = Message("assistant", "", (ToolCall("weather", {"town": "a" * 30}),))
    turn = (Message("user", "b" * 30), call, Message("tool", "c" * 200), Message("assistant", "d" * 30))
    example = Example((*turn, *turn))
    template = library_template("qwen3_nothink")
    one = own_ids(tokenizer, Example(turn), template)
    encoding = encode(tokenizer, template, example, len(one))
    assert encoding.input_ids == one
    assert encoding.messages_cut == 4
    text = tokenizer.decode(encode(tokenizer, template, example, len(one) - 150).input_ids)
    assert '{"name": "weather", "arguments": {"town": "' + "a" * 30 + '"}}' in text
    assert "<tool_response>\n" + "c" * 50 + "\n</tool_response>" in text
    assert "b" * 30 in text
    assert "d" * 30 in text


def test_an_end_of_turn_that_is_no_token_of_its_own_stays(tokenizer):
    example = Example((Message("user", "a"), Message("assistant", "b" * 50)))
    text = tokenizer.decode(encode(tokenizer, library_template("exaone"), example, 60).input_ids)
    assert text.endswith("[|assistant|]" + "b" * text.count("b") + "[|endofturn|]\n")
    assert 0 < text.count("b") < 50


# --- media and other marks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(tiny_model) -> Any:
    """The tiny tokenizer with marks of images and thoughts as Qwen has, and a run of spaces as Gemma has."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]})
    tokenizer.add_tokens(["    ", "<think>", "</think>"])
    return tokenizer


IMAGE = "<|vision_start|>" + "<|image_pad|>" * 12 + "<|vision_end|>"


@given(before=WORDS, behind=WORDS, answer=WORDS, less=st.integers(1, 60))
def test_an_image_is_never_cut(seeing, before, behind, answer, less):
    example = Example((Message("user", before + IMAGE + behind), Message("assistant", answer)))
    cutoff = max(1, len(own_ids(seeing, example, library_template("chatml"))) - less)
    encoding = encode(seeing, library_template("chatml"), example, cutoff)
    assert encoding.cut
    if encoding.input_ids:
        assert IMAGE in seeing.decode(encoding.input_ids)


def test_an_image_larger_than_the_cutoff(seeing):
    example = Example((Message("user", "a" + IMAGE + "b"), Message("assistant", "c" * 9)))
    assert encode(seeing, library_template("chatml"), example, 14).input_ids == []


def test_thoughts_are_cut_within_their_marks(seeing):
    """The template moves thoughts about, so they are not found as they were given; the marks are tokens."""
    example = Example((Message("user", "a"), Message("assistant", "<think>" + "b" * 50 + "</think>" + "c" * 20)))
    encoding = encode(seeing, library_template("qwen3"), example, 40)
    text = seeing.decode(encoding.input_ids)
    assert text.startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nbb")
    assert text.endswith("b</think><|im_end|>\n")


def test_fixed_tokens(seeing):
    fixed = FixedTokens.of(TokenizerState.of(seeing).load())
    text = "    a<|vision_start|><|image_pad|>frame<|image_pad|><|vision_end|>b<|vision_start|>c"
    ids = seeing(text, add_special_tokens=False)["input_ids"]
    kept = sorted(fixed.positions(ids))
    assert seeing.decode([ids[place] for place in kept]) == (
        "<|vision_start|><|image_pad|>frame<|image_pad|><|vision_end|><|vision_start|>"
    )


# --- what cannot be trained on ---------------------------------------------------------------------------------------


def test_what_is_trained_was_cut(tokenizer):
    """The only answer to learn is in a turn that had to go."""
    messages = [Message("user", "a" * 50), Message("assistant", "b"), Message("user", "a"), Message("assistant", "c")]
    messages[1], messages[3] = replace(messages[1], train=True), replace(messages[3], train=False)
    encoding = encode(tokenizer, tokenizer.chat_template, Example(tuple(messages)), 40)
    assert encoding.input_ids == encoding.labels == []
    assert encoding.cut > 40
    assert encoding.fault is None


def test_a_fault_is_not_a_cut(tokenizer):
    example = Example((Message("assistant", "a" * 50), Message("system", "b")))
    encoding = encode(tokenizer, library_template("chatml"), example, 8)
    assert encoding.cut == 0
    assert encoding.fault is not None
    assert "a system message stands first or not at all" in encoding.fault
