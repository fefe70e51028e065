"""The library of chat templates: every one renders as `apply_chat_template` does, and marks the answers and their end.

With real tokenizers too, where `RAYLOOM_TOKENIZERS` names a folder of theirs (`tests/real_tokenizers.py` writes one).
"""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tests.chat import renderer_of
from transformers import AutoTokenizer

from rayloom.data.encode import encode_conversations
from rayloom.data.encoding import IGNORED
from rayloom.data.example import Example, Message, ToolCall
from rayloom.data.template import Rendered
from rayloom.data.template_library import known_names, library_template, template_names

NAMES = [name for name, _ in template_names()]
WITH_TOOLS = {"llama3", "mistral", "qwen", "qwen2_vl", "qwen3", "qwen3_nothink"}

USER, ANSWER = Message("user", " What is\n1 + 2? Größe 👩‍🚀 "), Message("assistant", "It is\n\n3, 日本語.")
SYSTEM, AGAIN, LAST = Message("system", "Be brief."), Message("user", "And {{ 3 }} + 4?"), Message("assistant", "7")
CONVERSATIONS = [
    Example((USER, ANSWER)),
    Example((SYSTEM, USER, ANSWER)),
    Example((SYSTEM, USER, ANSWER, AGAIN, LAST)),
    Example((AGAIN, LAST, USER, ANSWER, AGAIN, LAST)),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
CALL = Message("assistant", "", (ToolCall("add", {"a": 1, "b": "ü"}),))
CALLING = [
    Example((SYSTEM, USER, CALL, Message("tool", '{"sum": 3}'), ANSWER), tools=(TOOL,)),
    Example(
        (USER, Message("assistant", "Well.", CALL.tool_calls), Message("tool", "3"), LAST, AGAIN, LAST), (TOOL, TOOL)
    ),
]


def render(tokenizer: Any, template: str, example: Example) -> Rendered:
    (rendered,) = renderer_of(tokenizer, template).render([example])
    assert isinstance(rendered, Rendered), rendered
    return rendered


def check_ids(tokenizer: Any, name: str) -> None:
    """Conversations and prompts are the tokenizer's own, token for token."""
    template = library_template(name)
    renderer = renderer_of(tokenizer, template)
    for example in CONVERSATIONS + (CALLING if name in WITH_TOOLS else []):
        options = {"chat_template": template, "tools": list(example.tools) or None, "tokenize": True}
        own = tokenizer.apply_chat_template(example.as_dicts(), return_dict=True, **options)["input_ids"]
        rendered = render(tokenizer, template, example)
        assert rendered.input_ids == own
        assert any(rendered.trained)
        assert not rendered.trained[0]
        prompt = Example(example.messages[:-1], example.tools)
        options |= {"add_generation_prompt": True, "return_dict": True}
        own_prompt = tokenizer.apply_chat_template(prompt.as_dicts(), **options)["input_ids"]
        assert renderer.render_prompts([prompt]) == [own_prompt]


def trained_runs(tokenizer: Any, rendered: Rendered) -> list[str]:
    pairs = zip(rendered.input_ids, rendered.trained, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for trained, run in runs if trained]


def test_names():
    assert len(NAMES) >= 40
    assert len(known_names()) == len(set(known_names()))
    assert "auto" not in known_names()
    assert library_template("yi") == library_template("chatml")
    assert library_template("nothing") is None


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_tokenizers(tokenizer, name):
    check_ids(tokenizer, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_and_their_end_are_trained(tokenizer, name):
    """The end: an end-of-turn of the template's own, or the tokenizer's."""
    runs = trained_runs(tokenizer, render(tokenizer, library_template(name), CONVERSATIONS[3]))
    assert len(runs) == 3
    for run, message in zip(runs, (LAST, ANSWER, LAST), strict=True):
        words, end = run.lstrip(" \n"), run.removeprefix(run[: run.index(message.content) + len(message.content)])
        assert words.startswith(message.content)
        assert end.strip() or name == "empty"


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_the_beginning_of_its_conversation(tokenizer, name):
    """So the model is asked as it was taught, and the next turn changes nothing of the last one."""
    renderer = renderer_of(tokenizer, library_template(name), enable_thinking=None)
    example = CONVERSATIONS[2]
    prompt, earlier = Example(example.messages[:-1]), Example(example.messages[:3])
    (prompt_ids,) = renderer.render_prompts([prompt])
    assert isinstance(prompt_ids, list)
    whole = tokenizer.decode(render(tokenizer, library_template(name), example).input_ids)
    assert whole.startswith(tokenizer.decode(prompt_ids))
    # GLM's answers end with the mark of the next turn, or with eos where there is none.
    text = tokenizer.decode(render(tokenizer, library_template(name), earlier).input_ids)
    assert whole.startswith(text.removesuffix("<|im_end|>") if name in ("glm4", "chatglm3") else text)


@pytest.mark.parametrize("name", NAMES)
def test_tools_are_rendered_or_refused(tokenizer, name):
    for example in CALLING:
        (rendered,) = renderer_of(tokenizer, library_template(name)).render([example])
        if name in WITH_TOOLS:
            assert isinstance(rendered, Rendered)
            text = tokenizer.decode(rendered.input_ids)
            assert text.count('"Adds."') == len(example.tools)
            assert '{"a": 1, "b": "ü"}' in trained_runs(tokenizer, rendered)[0]
            answers = [message for message in example.messages if message.role == "assistant"]
            assert len(trained_runs(tokenizer, rendered)) == len(answers)
        else:
            assert "this template cannot tell the model about tools" in str(rendered)
            (called,) = renderer_of(tokenizer, library_template(name)).render([Example(example.messages)])
            assert "this template cannot render tool calls" in str(called)


@pytest.mark.parametrize("name", NAMES)
def test_a_system_message_in_the_middle_is_refused(tokenizer, name):
    (error,) = renderer_of(tokenizer, library_template(name)).render([Example((USER, SYSTEM, LAST))])
    assert str(error).endswith("with the roles user, system, assistant: a system message stands first or not at all")


def test_golden(tokenizer):
    rendered = render(tokenizer, library_template("llama2"), Example((SYSTEM, AGAIN, LAST, AGAIN, LAST)))
    assert tokenizer.decode(rendered.input_ids) == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nAnd {{ 3 }} + 4? [/INST] 7 <|im_end|>"
        "[INST] And {{ 3 }} + 4? [/INST] 7 <|im_end|>"
    )
    assert trained_runs(tokenizer, rendered) == [" 7 <|im_end|>"] * 2


# --- real tokenizers -------------------------------------------------------------------------------------------------

FOLDER = Path(os.environ.get("RAYLOOM_TOKENIZERS", "/nonexistent"))
FOLDERS = sorted(path.parent for path in FOLDER.glob("*/tokenizer.json"))
real = pytest.mark.skipif(
    not FOLDERS, reason="RAYLOOM_TOKENIZERS names no folder of tokenizers (tests/real_tokenizers.py writes one)"
)


@real
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_ids_are_those_of_real_tokenizers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in NAMES:
        check_ids(tokenizer, name)


@real
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_models_own_templates(folder):
    """Those that mark no answers: the prefixes tell the same as the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        pytest.skip("has no chat template")
    example = CONVERSATIONS[1]
    own = tokenizer.apply_chat_template(example.as_dicts(), tokenize=True, return_dict=True)["input_ids"]
    rendered = render(tokenizer, tokenizer.chat_template, example)
    assert rendered.input_ids == own
    (run,) = trained_runs(tokenizer, rendered)
    assert ANSWER.content in run


@real
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_cutting_with_real_tokenizers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in sorted(WITH_TOOLS | {"chatml", "llama2", "glm4"}):
        renderer = renderer_of(tokenizer, library_template(name))
        for example in CONVERSATIONS + (CALLING if name in WITH_TOOLS else []):
            whole = render(tokenizer, library_template(name), example)
            for cutoff in range(8, len(whole.input_ids), 7):
                (encoding,) = encode_conversations(renderer, [example], cutoff)
                assert encoding.fault is None
                assert len(encoding.input_ids) <= cutoff
                assert encoding.cut == len(whole.input_ids) - len(encoding.input_ids)
                if encoding.input_ids:
                    assert [label for label in encoding.labels if label != IGNORED][-1] == learnt(whole)[-1]


def learnt(rendered: Rendered) -> list[int]:
    return [token for token, trained in zip(rendered.input_ids, rendered.trained, strict=True) if trained]
