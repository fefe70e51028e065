"""Chat templates: the ids are the tokenizer's own, and the mask covers the answers and their end-of-turn, no more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.chat import MARKED, SINGLE, conversation, own_ids, render_one, renderer_of, trained_runs
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rayloom.data.example import Example, Message, ToolCall
from rayloom.data.spans import token_range
from rayloom.data.template import Rendered, Renderer
from rayloom.data.template_library import library_template

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


def fault(renderer: Renderer, example: Example) -> str:
    (error,) = renderer.render([example])
    assert isinstance(error, ValueError)
    return str(error)


# --- ids and masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [False, True])
@given(batch=st.lists(examples(), min_size=1, max_size=3))
def test_ids_are_the_tokenizers_and_trained_is_what_was_answered(tokenizer, marked, batch):
    template = MARKED if marked else tokenizer.chat_template
    rendered = renderer_of(tokenizer, template).render(batch)
    for example, one in zip(batch, rendered, strict=True):
        assert one.input_ids == own_ids(tokenizer, example, template)
        answers = [message.content + "<|im_end|>" for message in example.messages if message.role == "assistant"]
        assert trained_runs(tokenizer, one) == answers


@given(batch=st.lists(examples(), max_size=3))
def test_a_template_that_marks_answers_gives_the_mask_of_one_that_does_not(tokenizer, batch):
    assert renderer_of(tokenizer, MARKED).render(batch) == renderer_of(tokenizer, tokenizer.chat_template).render(batch)


@given(example=examples())
def test_marks_without_the_end_of_turn_cover_the_answers_alone(tokenizer, example):
    """Also where the last character of an answer takes several tokens, of which transformers' mask has one."""
    template = MARKED.replace("'<|im_end|>' }}{% endgeneration %}", "'' }}{% endgeneration %}{{ '<|im_end|>' }}")
    assert template != MARKED
    rendered = render_one(renderer_of(tokenizer, template), example)
    assert rendered.input_ids == own_ids(tokenizer, example, tokenizer.chat_template)
    answers = [message.content for message in example.messages if message.role == "assistant" and message.content]
    assert trained_runs(tokenizer, rendered) == answers


@given(batch=st.lists(examples(), max_size=4))
def test_a_batch_is_its_examples_one_by_one(tokenizer, batch):
    renderer = renderer_of(tokenizer, tokenizer.chat_template)
    assert renderer.render(batch) == [one for example in batch for one in renderer.render([example])]


def test_golden(tokenizer):
    rendered = render_one(renderer_of(tokenizer, tokenizer.chat_template), MULTI)
    assert tokenizer.decode(rendered.input_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n Yes?\n\nWell\n<|im_end|>\n"
        "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )
    assert trained_runs(tokenizer, rendered) == [" Yes?\n\nWell\n<|im_end|>", "3<|im_end|>"]
    assert not rendered.trained[-1]  # the line break behind the last end-of-turn


def test_without_an_end_of_turn_token_the_whole_rest_is_the_answer(tokenizer):
    rendered = render_one(renderer_of(tokenizer, PLAIN), SINGLE)
    assert trained_runs(tokenizer, rendered) == ["My name is Loomis.\n"]


def test_a_token_that_begins_in_the_prompt_is_not_trained(tokenizer):
    """ "spider" is one token, of which the prompt has the first three letters: the answer begins behind it."""
    assert len(tokenizer.encode(" spider", add_special_tokens=False)) == 1
    template = "{%- for m in messages -%}{{ m['content'] if m['role'] == 'user' else m['content'] }}{%- endfor -%}"
    (rendered,) = renderer_of(tokenizer, template).render(
        [conversation(("user", "A spi"), ("assistant", "der has eight."))]
    )
    assert tokenizer.decode(rendered.input_ids) == "A spider has eight."
    assert trained_runs(tokenizer, rendered) == [" has eight."]


def test_a_token_that_ends_behind_the_answer_is_not_trained(tokenizer):
    template = "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}"
    template += "{% generation %}{{ m['content'] }}{% endgeneration %}der{%- endif -%}{%- endfor -%}"
    (rendered,) = renderer_of(tokenizer, template).render([conversation(("user", ""), ("assistant", "A spi"))])
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
    assert renderer_of(beginning, template).render([MULTI]) == renderer_of(tokenizer, template).render([MULTI])


def test_no_examples(tokenizer):
    assert renderer_of(tokenizer, tokenizer.chat_template).render([]) == []


def test_neither_tokenizer_nor_example_is_changed(tokenizer):
    before = (tokenizer.chat_template, tokenizer.padding_side, tokenizer.truncation_side, len(tokenizer))
    dicts = MULTI.as_dicts()
    renderer_of(tokenizer, MARKED).render([MULTI])
    renderer_of(tokenizer, PLAIN).render([MULTI])
    assert (tokenizer.chat_template, tokenizer.padding_side, tokenizer.truncation_side, len(tokenizer)) == before
    assert MULTI.as_dicts() == dicts


# --- prompts, tools, thinking ----------------------------------------------------------------------------------------

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells.", "parameters": {"type": "object", "properties": {}}},
}
CALLS = Example(
    (
        Message("user", "Rain?"),
        Message("assistant", "", (ToolCall("weather", {"town": "Köln"}), ToolCall("weather", '{"town": "Ulm"}'))),
        Message("tool", "wet"),
        Message("tool", "dry"),
        Message("assistant", "In Köln."),
        Message("user", "Thanks"),
        Message("assistant", "Bye"),
    ),
    tools=(WEATHER,),
)
THOUGHT = conversation(
    ("user", "1+1?"), ("assistant", "<think>\nadd\n</think>\n\n2"), ("user", "2+2?"), ("assistant", "4")
)


@given(batch=st.lists(examples(), min_size=1, max_size=3))
def test_prompts_are_the_tokenizers(tokenizer, batch):
    prompts = [Example(example.messages[:-1]) for example in batch]
    for template in (MARKED, tokenizer.chat_template):
        expected = [own_ids(tokenizer, prompt, template, add_generation_prompt=True) for prompt in prompts]
        assert renderer_of(tokenizer, template).render_prompts(prompts) == expected


def test_a_prompt_that_is_refused_leaves_the_others_alone(tokenizer):
    good, bad = renderer_of(tokenizer, NO_SYSTEM + MARKED).render_prompts([SINGLE, MULTI])
    assert isinstance(good, list)
    assert isinstance(bad, ValueError)


def without_marks(template: str) -> str:
    for mark in ("{%- generation -%}", "{%- endgeneration -%}"):
        assert mark in template
        template = template.replace(mark, "")
    return template


def test_tool_turns_without_marks_are_those_with_marks(tokenizer):
    marked = library_template("qwen3_nothink")
    rendered = render_one(renderer_of(tokenizer, marked), CALLS)
    assert rendered.input_ids == own_ids(tokenizer, CALLS, marked)
    assert rendered == render_one(renderer_of(tokenizer, without_marks(marked)), CALLS)
    assert trained_runs(tokenizer, rendered) == [
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call><|im_end|>',
        "In Köln.<|im_end|>",
        "Bye<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("enable_thinking", "first", "second"),
    [
        (None, "<think>\nadd\n</think>\n\n2<|im_end|>", "4<|im_end|>"),
        (True, "<think>\nadd\n</think>\n\n2<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"),
        (False, "2<|im_end|>", "4<|im_end|>"),
    ],
)
def test_thinking(tokenizer, enable_thinking, first, second):
    template = library_template("qwen3")
    renderer = renderer_of(tokenizer, template, enable_thinking=enable_thinking)
    rendered = render_one(renderer, THOUGHT)
    option = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    assert rendered.input_ids == own_ids(tokenizer, THOUGHT, template, **option)
    assert trained_runs(tokenizer, rendered) == [first, second]
    prompt = Example(THOUGHT.messages[:1])
    expected = own_ids(tokenizer, prompt, template, add_generation_prompt=True, **option)
    assert renderer.render_prompts([prompt]) == [expected]
    assert ("</think>" in tokenizer.decode(expected)) == (enable_thinking is False)


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [False, True])
def test_everything_or_the_last_answer(tokenizer, marked):
    template = MARKED if marked else tokenizer.chat_template
    assert all(render_one(renderer_of(tokenizer, template, train_on_prompt=True), MULTI).trained)
    last = render_one(renderer_of(tokenizer, template, mask_history=True), MULTI)
    assert trained_runs(tokenizer, last) == ["3<|im_end|>"]
    with pytest.raises(ValueError, match="choose one"):
        renderer_of(tokenizer, template, train_on_prompt=True, mask_history=True)


@pytest.mark.parametrize("marked", [False, True])
def test_a_message_has_the_last_word(tokenizer, marked):
    template = MARKED if marked else tokenizer.chat_template
    turns = list(MULTI.messages)
    turns[1] = Message("user", "Hi", train=True)
    turns[2] = Message("assistant", turns[2].content, train=False)
    flagged = Example(tuple(turns))
    assert trained_runs(tokenizer, render_one(renderer_of(tokenizer, template), flagged)) == [
        "Hi",
        "3<|im_end|>",
    ]
    everything = render_one(renderer_of(tokenizer, template, train_on_prompt=True), flagged)
    left_out = [token for token, trained in zip(everything.input_ids, everything.trained, strict=True) if not trained]
    assert tokenizer.decode(left_out) == " Yes?\n\nWell\n<|im_end|>"
    turns[2] = Message("assistant", turns[2].content, train=True)
    history = render_one(renderer_of(tokenizer, template, mask_history=True), Example(tuple(turns)))
    assert trained_runs(tokenizer, history) == ["Hi", " Yes?\n\nWell\n<|im_end|>", "3<|im_end|>"]


def test_answers_of_several_blocks_are_told_apart_where_it_matters(tokenizer):
    """A template may mark an answer's thought and its words each, or mark nothing of an empty one."""
    template = MARKED.replace(
        "{% generation %}{{ message['content']",
        "{% generation %}{{ message['content'][:1] }}{% endgeneration %}{% generation %}{{ message['content'][1:]",
    )
    assert template.count("endgeneration") == 2
    assert (
        render_one(renderer_of(tokenizer, template), MULTI).trained
        == render_one(renderer_of(tokenizer, MARKED), MULTI).trained
    )
    last = render_one(renderer_of(tokenizer, template, mask_history=True), MULTI)
    assert trained_runs(tokenizer, last) == ["3<|im_end|>"]


def test_a_prompt_to_train_that_the_template_changes_is_refused(tokenizer):
    template = MARKED.replace(
        "{{ message['content'] + '<|im_end|>' }}\n{%- endif", "{{ message['content'] | upper }}\n{%- endif"
    )
    example = Example((Message("user", "Hi", train=True), Message("assistant", "Yes?")))
    assert "does not render its text as it is" in fault(renderer_of(tokenizer, template), example)


def test_half_a_character_is_refused_and_leaves_the_others_alone(tokenizer):
    good, bad = renderer_of(tokenizer, MARKED).render([SINGLE, conversation(("user", "a\ud83d"), ("assistant", "b"))])
    assert isinstance(good, Rendered)
    assert str(bad) == "the conversation holds '\\ud83d', which is no character"


@given(text=TEXT, bounds=st.tuples(st.integers(0, 20), st.integers(0, 20)))
def test_the_tokens_in_a_span_are_those_whose_offsets_are(tokenizer, text, bounds):
    text += "<|im_end|> end 👩‍🚀"
    start, stop = sorted(min(bound, len(text)) for bound in bounds)
    encoded = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
    first, behind = token_range(encoded.encodings[0], (start, stop))
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"][0]) if start <= a and b <= stop]
    assert list(range(first, behind)) == inside


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    renderer = renderer_of(tokenizer, FORGETFUL)
    thinking = conversation(
        ("user", "Hi"), ("assistant", "<think>x</think>Yes?"), ("user", "Why?"), ("assistant", "<think>y</think>So.")
    )
    refused = fault(renderer, thinking)
    assert refused.startswith("the chat template rewrites earlier turns")
    assert refused.endswith("use a template with {% generation %} blocks")
    last = Example(thinking.messages[2:])
    assert trained_runs(tokenizer, renderer.render([last])[0]) == ["<think>y</think>So.<|im_end|>"]


def test_a_template_whose_prompt_is_no_beginning_of_the_whole_is_refused(tokenizer):
    template = tokenizer.chat_template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>model\\n'")
    assert template != tokenizer.chat_template
    assert "rewrites earlier turns" in fault(renderer_of(tokenizer, template), SINGLE)


@pytest.mark.parametrize("template", ["", "{% generation %}{% endgeneration %}"])
def test_a_template_that_renders_nothing_is_refused(tokenizer, template):
    assert fault(renderer_of(tokenizer, template), SINGLE) == "the chat template renders nothing for this conversation"


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_that_refuses_a_conversation_says_why(tokenizer, marked):
    renderer = renderer_of(tokenizer, NO_SYSTEM + (MARKED if marked else tokenizer.chat_template))
    good, bad, also_good = renderer.render([SINGLE, MULTI, SINGLE])
    assert isinstance(bad, ValueError)
    assert str(bad) == (
        "the chat template refuses a conversation with the roles system, user, assistant: System role not supported"
    )
    assert good == also_good == render_one(renderer, SINGLE)  # one bad row leaves the others alone
