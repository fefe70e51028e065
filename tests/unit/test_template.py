"""Chat templates: the ids are the tokenizer's own, and the mask covers the answers and their end-of-turn, no more."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rayloom.data.example import Example, Message
from rayloom.data.template import Rendered, Renderer, resolve_template
from rayloom.errors import RequestError

MARKED = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ message['content'] + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# As reasoning models do it: only the last answer is rendered as it was given.
FORGETFUL = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' and not loop.last -%}
{{ message['content'].split('</think>')[-1] }}
{%- else -%}
{{ message['content'] }}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

NO_SYSTEM = """\
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"""

# Without special tokens: nothing but the text itself ends a turn.
PLAIN = """\
{%- for message in messages -%}{{ message['role'] + ': ' + message['content'] + '\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"""


def conversation(*turns: tuple[str, str]) -> Example:
    return Example(tuple(Message(role, text) for role, text in turns))


SINGLE = conversation(("user", "What is your name?"), ("assistant", "My name is Loomis."))
MULTI = conversation(
    ("system", "Be brief."),
    ("user", "Hi"),
    ("assistant", " Yes?\n\nWell\n"),
    ("user", "Add 1 and 2."),
    ("assistant", "3"),
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["", " ", "\n", "assistant\n", "im_end|>", "日本語 👩‍🚀", "e\u0301", "a\r\nb", "{{ x }}", "<|im_start"]
)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    system = draw(st.lists(st.tuples(st.just("system"), TEXT), max_size=1))
    pairs = draw(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    return conversation(*system, *turns)


def trained_runs(tokenizer: Any, rendered: Rendered) -> list[str]:
    """The text of every unbroken run of trained tokens."""
    pairs = zip(rendered.input_ids, rendered.trained, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for trained, run in runs if trained]


def own_ids(tokenizer: Any, example: Example, template: str) -> list[int]:
    encoded = tokenizer.apply_chat_template(example.as_dicts(), chat_template=template, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


# --- ids and masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [False, True])
@given(batch=st.lists(examples(), min_size=1, max_size=3))
def test_ids_are_the_tokenizers_and_trained_is_what_was_answered(tokenizer, marked, batch):
    template = MARKED if marked else tokenizer.chat_template
    rendered = Renderer(tokenizer, template).render(batch)
    for example, one in zip(batch, rendered, strict=True):
        assert one.input_ids == own_ids(tokenizer, example, template)
        answers = [message.content + "<|im_end|>" for message in example.messages if message.role == "assistant"]
        assert trained_runs(tokenizer, one) == answers


@given(batch=st.lists(examples(), max_size=3))
def test_a_template_that_marks_answers_gives_the_mask_of_one_that_does_not(tokenizer, batch):
    assert Renderer(tokenizer, MARKED).render(batch) == Renderer(tokenizer, tokenizer.chat_template).render(batch)


@given(example=examples())
def test_marks_without_the_end_of_turn_cover_the_answers_alone(tokenizer, example):
    """Also where the last character of an answer takes several tokens, of which transformers' mask has one."""
    template = MARKED.replace("'<|im_end|>' }}{% endgeneration %}", "'' }}{% endgeneration %}{{ '<|im_end|>' }}")
    assert template != MARKED
    (rendered,) = Renderer(tokenizer, template).render([example])
    assert rendered.input_ids == own_ids(tokenizer, example, tokenizer.chat_template)
    answers = [message.content for message in example.messages if message.role == "assistant" and message.content]
    assert trained_runs(tokenizer, rendered) == answers


@given(batch=st.lists(examples(), max_size=4))
def test_a_batch_is_its_examples_one_by_one(tokenizer, batch):
    renderer = Renderer(tokenizer, tokenizer.chat_template)
    assert renderer.render(batch) == [one for example in batch for one in renderer.render([example])]


def test_golden(tokenizer):
    (rendered,) = Renderer(tokenizer, tokenizer.chat_template).render([MULTI])
    assert tokenizer.decode(rendered.input_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n Yes?\n\nWell\n<|im_end|>\n"
        "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )
    assert trained_runs(tokenizer, rendered) == [" Yes?\n\nWell\n<|im_end|>", "3<|im_end|>"]
    assert not rendered.trained[-1]  # the line break behind the last end-of-turn


def test_without_an_end_of_turn_token_the_whole_rest_is_the_answer(tokenizer):
    (rendered,) = Renderer(tokenizer, PLAIN).render([SINGLE])
    assert trained_runs(tokenizer, rendered) == ["My name is Loomis.\n"]


def test_a_token_that_begins_in_the_prompt_is_not_trained(tokenizer):
    """ "spider" is one token, of which the prompt has the first three letters: the answer begins behind it."""
    assert len(tokenizer.encode(" spider", add_special_tokens=False)) == 1
    template = "{%- for m in messages -%}{{ m['content'] if m['role'] == 'user' else m['content'] }}{%- endfor -%}"
    (rendered,) = Renderer(tokenizer, template).render(
        [conversation(("user", "A spi"), ("assistant", "der has eight."))]
    )
    assert tokenizer.decode(rendered.input_ids) == "A spider has eight."
    assert trained_runs(tokenizer, rendered) == [" has eight."]


def test_a_token_that_ends_behind_the_answer_is_not_trained(tokenizer):
    template = "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}"
    template += "{% generation %}{{ m['content'] }}{% endgeneration %}der{%- endif -%}{%- endfor -%}"
    (rendered,) = Renderer(tokenizer, template).render([conversation(("user", ""), ("assistant", "A spi"))])
    assert tokenizer.decode(rendered.input_ids) == "A spider"
    assert trained_runs(tokenizer, rendered) == ["A"]


@pytest.mark.parametrize("marked", [False, True])
def test_nothing_is_put_before_what_the_template_renders(tiny_model, tokenizer, marked):
    """Many tokenizers begin every text with a token of their own; in a chat that is the template's affair."""
    beginning = AutoTokenizer.from_pretrained(tiny_model)
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", beginning.pad_token_id)]
    )
    assert beginning("Hi")["input_ids"][0] == beginning.pad_token_id
    template = MARKED if marked else tokenizer.chat_template
    assert Renderer(beginning, template).render([MULTI]) == Renderer(tokenizer, template).render([MULTI])


def test_no_examples(tokenizer):
    assert Renderer(tokenizer, tokenizer.chat_template).render([]) == []


def test_neither_tokenizer_nor_example_is_changed(tokenizer):
    before = (tokenizer.chat_template, tokenizer.padding_side, tokenizer.truncation_side, len(tokenizer))
    dicts = MULTI.as_dicts()
    Renderer(tokenizer, MARKED).render([MULTI])
    Renderer(tokenizer, PLAIN).render([MULTI])
    assert (tokenizer.chat_template, tokenizer.padding_side, tokenizer.truncation_side, len(tokenizer)) == before
    assert MULTI.as_dicts() == dicts


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    renderer = Renderer(tokenizer, FORGETFUL)
    thinking = conversation(
        ("user", "Hi"), ("assistant", "<think>x</think>Yes?"), ("user", "Why?"), ("assistant", "<think>y</think>So.")
    )
    with pytest.raises(ValueError, match=r"rewrites earlier turns.* use a template with \{% generation %\} blocks"):
        renderer.render([thinking])
    last = Example(thinking.messages[2:])
    assert trained_runs(tokenizer, renderer.render([last])[0]) == ["<think>y</think>So.<|im_end|>"]


def test_a_template_whose_prompt_is_no_beginning_of_the_whole_is_refused(tokenizer):
    template = tokenizer.chat_template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>model\\n'")
    assert template != tokenizer.chat_template
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        Renderer(tokenizer, template).render([SINGLE])


@pytest.mark.parametrize("template", ["", "{% generation %}{% endgeneration %}"])
def test_a_template_that_renders_nothing_is_refused(tokenizer, template):
    with pytest.raises(ValueError, match="renders nothing for this conversation"):
        Renderer(tokenizer, template).render([SINGLE])


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_that_refuses_a_conversation_says_why(tokenizer, marked):
    renderer = Renderer(tokenizer, NO_SYSTEM + (MARKED if marked else tokenizer.chat_template))
    assert len(renderer.render([SINGLE])) == 1
    with pytest.raises(ValueError, match="with the roles system, user, assistant: System role not supported"):
        renderer.render([MULTI])


# --- which template -------------------------------------------------------------------------------------------------


class Bare:
    """What `resolve_template` asks of a tokenizer under `auto`."""

    def __init__(self, chat_template: Any) -> None:
        self.chat_template = chat_template


def test_auto_is_the_models_own(tokenizer):
    assert resolve_template("auto", tokenizer, "m") == tokenizer.chat_template
    assert resolve_template("auto", Bare({"default": "a", "tool_use": "b"}), "m") == "a"


@pytest.mark.parametrize("own", [None, "", {}, {"tool_use": "b"}])
def test_auto_without_a_template_of_the_model(own):
    with pytest.raises(RequestError) as refused:
        resolve_template("auto", Bare(own), "m")
    assert refused.value.messages == ("data.template: auto: m has no chat template; name a .jinja file instead",)


def test_a_file_is_read_as_it_is(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "t.jinja").write_text(MARKED, encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_template("~/t.jinja", tokenizer, "m") == MARKED


@pytest.mark.parametrize("name", ["nope.jinja", "chatml", "folder.jinja", "t.txt"])
def test_what_is_no_template_file(tokenizer, tmp_path, name):
    (tmp_path / "folder.jinja").mkdir()
    (tmp_path / "t.txt").write_text(MARKED)
    path = str(tmp_path / name)
    with pytest.raises(RequestError) as refused:
        resolve_template(path, tokenizer, "m")
    assert refused.value.messages == (
        f"data.template: unknown {path!r}; give `auto` or the path of a .jinja file that exists",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n{% if %}", ":2: not a template: Expected an expression, got 'end of statement block'"),
        ("{% for %}", ":1: not a template: Expected an expression, got 'end of statement block'"),
        ("{{ nothing.x }}", ": the template does not render a plain conversation: 'nothing' is undefined"),
        ("{{ raise_exception('no') }}", ": the template does not render a plain conversation: no"),
        ("{{ 1 / 0 }}", ": the template does not render a plain conversation: division by zero"),
        (
            "{{ messages[0] + 1 }}",
            ": the template does not render a plain conversation: unsupported operand type(s) for +: 'dict' and 'int'",
        ),
        (b"\xff", ": cannot be read as text: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_templates_that_do_not_work(tokenizer, tmp_path, text, message):
    path = Path(tmp_path / "t.jinja")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RequestError) as refused:
        resolve_template(str(path), tokenizer, "m")
    assert refused.value.messages == (f"{path}{message}",)
