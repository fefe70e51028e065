"""From `data.template` to the text of a template: the model's own, TRL's version of it, the library's, a file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.chat import MARKED, SINGLE, render_one, renderer_of, trained_runs
from transformers import AutoTokenizer

from rayloom.data.template_choice import resolve_template
from rayloom.data.template_library import library_template
from rayloom.errors import RequestError


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
    assert refused.value.messages == (
        "data.template: auto: m has no chat template; name one that `rayloom templates` lists, or a .jinja file",
    )


def test_auto_of_a_known_family_without_a_template_of_the_model():
    assert resolve_template("auto", Bare(None), "meta-llama/Llama-2-7b-hf") == library_template("llama2")


def test_a_name_of_models_that_ship_a_template(tokenizer):
    assert resolve_template("gpt_oss", tokenizer, "m") == resolve_template("auto", tokenizer, "m")
    with pytest.raises(RequestError, match="gpt_oss stands for the template that such models ship, and m has none"):
        resolve_template("gpt_oss", Bare(None), "m")


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
        f"data.template: unknown {path!r}; give `auto`, a name that `rayloom templates` lists, "
        "or the path of a .jinja file that exists",
    )


def test_a_name_of_the_library(tokenizer):
    assert resolve_template("qwen2_5", tokenizer, "m") == library_template("qwen")
    with pytest.raises(
        RequestError, match=r"^data\.template: unknown 'qwen33'; did you mean 'qwen3'\? Give `auto`, a na"
    ):
        resolve_template("qwen33", tokenizer, "m")


def test_auto_takes_trls_training_version(tiny_model):
    """TRL knows the template by its text, and has one that marks the answers of the same turns."""
    from trl import chat_template_utils

    model = AutoTokenizer.from_pretrained(tiny_model)
    model.chat_template = chat_template_utils.qwen3_chat_template
    template = resolve_template("auto", model, "m")
    assert template == chat_template_utils.qwen3_training_chat_template
    assert model.chat_template == chat_template_utils.qwen3_chat_template
    # That template has leading line breaks of an answer go, and the line break behind the end-of-turn learnt.
    assert trained_runs(model, render_one(renderer_of(model, template), SINGLE)) == [
        "<think>\n\n</think>\n\nMy name is Loomis.<|im_end|>\n"
    ]


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
