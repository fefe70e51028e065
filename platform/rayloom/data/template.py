"""Chat templates: an `Example` -> token ids, and which of them are the assistant's words.

One mechanism: the tokenizer's own `apply_chat_template`. The mask comes from the template's `{% generation %}` blocks
where it has them; else from rendering prefixes: the text up to the answer (with the generation prompt) and the text up
to the answer's end must both be prefixes of the whole, and what lies between them is the answer. The whole text is
tokenized once, so the ids are exactly `apply_chat_template(tokenize=True)`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from rayloom.data.example import Example
from rayloom.errors import RequestError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation, and for each whether it is trained (the assistant's words and the end-of-turn)."""

    input_ids: list[int]
    trained: list[bool]


def resolve_template(template: str, tokenizer: Any, model_path: str) -> str:
    """The Jinja text for the job's `data.template`.

    Raises:
        RequestError: a model without its own template, a file that is not there, or text that is no template.
    """
    if template == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise RequestError(f"data.template: auto: {model_path} has no chat template; name a .jinja file instead")
        return own
    file = Path(template).expanduser()
    if file.suffix != ".jinja" or not file.is_file():
        raise RequestError(f"data.template: unknown {template!r}; give `auto` or the path of a .jinja file that exists")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{template}: cannot be read as text: {error}") from None
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            chat_template=text,
            tokenize=False,
        )
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(f"{template}:{error.lineno}: not a template: {error.message}") from None
    except Exception as error:  # a template may do whatever Python can: divide by zero, add text to nothing
        raise RequestError(f"{template}: the template does not render a plain conversation: {error}") from None
    return text


class Renderer:
    """Renders examples with one tokenizer and one template. Changes neither."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._marks_answers = bool(_GENERATION.search(template))
        self._end_of_turn = tuple(tokenizer.get_added_vocab())

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """Render a batch; one tokenizer call for all of them.

        Raises:
            ValueError: the template cannot say where an answer begins and ends, renders nothing, or refuses an example.
        """
        if not examples:
            return []
        find = self._marked_spans if self._marks_answers else self._spans
        texts, spans = zip(*(find(example.as_dicts()) for example in examples), strict=True)
        if not all(texts):
            raise ValueError("the chat template renders nothing for this conversation")
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        return [
            Rendered(ids, _inside(offsets, answers))
            for ids, offsets, answers in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
        ]

    def _marked_spans(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the characters that `{% generation %}` blocks made.

        Not `apply_chat_template`'s own mask: where the last character of an answer takes several tokens, it has only
        the first of them.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusals(messages):
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        (text,), (spans,) = rendered
        return text, spans

    def _spans(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the characters between the prefixes that end before and behind each answer."""
        whole = self._text(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:index], add_generation_prompt=True)
            upto = whole if index == len(messages) - 1 else self._text(messages[: index + 1])
            if not (whole.startswith(upto) and upto.startswith(before)):
                raise ValueError(
                    "the chat template rewrites earlier turns, so the answers cannot be told from the prompts; "
                    "use a template with {% generation %} blocks"
                )
            spans.append((len(before), self._end_of_answer(upto)))
        return whole, spans

    def _end_of_answer(self, text: str) -> int:
        """Up to and with the end-of-turn token; the line break that templates write behind it is not an answer."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self._end_of_turn) else len(text)

    def _text(self, messages: list[dict[str, str]], **options: Any) -> str:
        with _refusals(messages):
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, **options
            )


@contextmanager
def _refusals(messages: list[dict[str, str]]) -> Iterator[None]:
    """Turn what a template raises, such as its own `raise_exception("no system message")`, into a `ValueError`."""
    try:
        yield
    except jinja2.TemplateError as error:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise ValueError(f"the chat template refuses a conversation with the roles {roles}: {error}") from None


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token whether it lies in a span. A token that begins before an answer belongs to the prompt."""
    trained = [False] * len(offsets)
    token = 0
    for start, stop in spans:
        while token < len(offsets) and offsets[token][0] < start:
            token += 1
        while token < len(offsets) and offsets[token][0] < stop:
            trained[token] = offsets[token][1] <= stop
            token += 1
    return trained
