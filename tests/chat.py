"""What the tests of chat templates share: small conversations, a template, and what is asked of a rendering."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rayloom.data.example import Example, Message
from rayloom.data.template import Rendered, Renderer
from rayloom.models.text_tokenizer import TokenizerState

# A template that marks its answers.
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


def conversation(*turns: tuple[Any, str]) -> Example:
    """(role, text) of each turn."""
    return Example(tuple(Message(role, text) for role, text in turns))


SINGLE = conversation(("user", "What is your name?"), ("assistant", "My name is Loomis."))


_STATES: dict[tuple[int, int], tuple[Any, TokenizerState]] = {}


def renderer_of(tokenizer: Any, template: str, **options: Any) -> Renderer:
    """A renderer with a tokenizer of transformers, as the data tasks have it."""
    size = (id(tokenizer), len(tokenizer))  # a large vocabulary takes a second to write down
    if size not in _STATES:
        _STATES[size] = (tokenizer, TokenizerState.of(tokenizer))
    return Renderer(_STATES[size][1].load(), template, **options)


def trained_runs(tokenizer: Any, rendered: Rendered) -> list[str]:
    """The text of every unbroken run of trained tokens."""
    pairs = zip(rendered.input_ids, rendered.trained, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for trained, run in runs if trained]


def own_ids(tokenizer: Any, example: Example, template: str, **options: Any) -> list[int]:
    """The ids that the tokenizer itself makes of a conversation."""
    encoded = tokenizer.apply_chat_template(
        example.as_dicts(),
        tools=list(example.tools) or None,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        **options,
    )
    return list(encoded["input_ids"])


def render_one(renderer: Renderer, example: Example) -> Rendered:
    """One example, which must be rendered."""
    (rendered,) = renderer.render([example])
    assert isinstance(rendered, Rendered), rendered
    return rendered
