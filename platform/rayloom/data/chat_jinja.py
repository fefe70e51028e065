"""Chat templates as Jinja: the environment in which transformers renders them, without transformers.

Loading transformers' own takes each data task two seconds, for it brings torch. What templates may use is written in
transformers' documentation (chat templating): sandboxed Jinja with loop controls, blocks trimmed, `raise_exception`,
`strftime_now`, a `tojson` that escapes no HTML, and `{% generation %}` around an answer. The tests compare the two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Span = tuple[int, int]
"""Start and stop, of characters or of tokens; the stop is not in it."""


class ChatTemplate:
    """A compiled chat template.

    Raises:
        jinja2.TemplateError: it does not compile.
    """

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._template = environment.from_string(source)
        self._written = _Written()
        environment.extend(written=self._written)

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], **variables: Any
    ) -> tuple[str, list[Span]]:
        """The text, and the characters of it that `{% generation %}` blocks made.

        Args:
            tools: JSON schemas of functions; the template sees none where it is empty.
            variables: `add_generation_prompt`, `bos_token` and the like.

        Raises:
            Exception: whatever the template raises, `jinja2.TemplateError` where it refuses a conversation.
        """
        written = self._written
        written.clear()
        for block in self._template.generate(
            messages=messages, tools=list(tools) or None, documents=None, **{"add_generation_prompt": False} | variables
        ):
            written.add(block)
        return "".join(written.blocks), written.spans


@lru_cache(maxsize=256)
def compile_template(source: str) -> ChatTemplate:
    """The template, compiled once in a process."""
    return ChatTemplate(source)


class _Written:
    """What a rendering has written so far. One rendering at a time."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.blocks: list[str] = []
        self.length = 0
        self.spans: list[Span] = []

    def add(self, block: str) -> None:
        self.blocks.append(block)
        self.length += len(block)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what is between them is an answer."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    def _generated(self, caller: Any) -> str:
        text = str(caller())
        written: _Written = self.environment.written  # type: ignore[attr-defined]
        written.spans.append((written.length, written.length + len(text)))
        return text


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
