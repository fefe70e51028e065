"""What the formats share: how a column is looked up, and what is checked of every example."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from rayloom.data.description import Description
from rayloom.data.example import Example, Message, Role
from rayloom.data.formats.calls import read_tools

Row = dict[str, Any]
Converter = Callable[[Row, Description], Example]


def value(row: Row, column: str) -> Any:
    """A column that must be there."""
    if column not in row:
        raise ValueError(f"has no column {column!r}; its columns are {', '.join(map(repr, row)) or 'none'}")
    return row[column]


def text(row: Row, column: str) -> str:
    """A column that must be there and hold text."""
    found = value(row, column)
    if not isinstance(found, str):
        raise ValueError(f"column {column!r} must be text, not {found!r:.60}")
    return found


def optional_text(row: Row, column: str | None) -> str:
    """A column that may be absent, null or empty; then ""."""
    return text(row, column) if column and row.get(column) else ""


def media(row: Row, column: str | None) -> tuple[Any, ...]:
    """Images, videos or sounds, carried through as they are: one, or a list of them."""
    found = row.get(column) if column else None
    if found is None:
        return ()
    items = tuple(found) if isinstance(found, list) else (found,)
    for number, item in enumerate(items, 1):
        if item is None:
            raise ValueError(f"column {column!r}: entry {number} is empty")
    return items


def _desirable(row: Row, column: str | None) -> bool | None:
    """KTO's judgement; None where the description names no column for it."""
    if column is None:
        return None
    found = value(row, column)
    if not isinstance(found, int) or found not in (0, 1):  # CSV has no other word for it than 0 and 1
        raise ValueError(f"column {column!r} must be true or false, not {found!r:.60}")
    return bool(found)


def finish(
    row: Row,
    description: Description,
    messages: Sequence[Message],
    *,
    chosen: Sequence[Message] = (),
    rejected: Sequence[Message] = (),
) -> Example:
    """Add what does not depend on the format (tools, judgement, media) and check the whole.

    Raises:
        ValueError: what is wrong with the row.
    """
    columns = description.columns
    example = Example(
        messages=tuple(messages),
        tools=read_tools(row.get(columns.tools), f"column {columns.tools!r}") if columns.tools else (),
        chosen=tuple(chosen),
        rejected=tuple(rejected),
        desirable=None if chosen else _desirable(row, columns.kto_tag),
        images=media(row, columns.images),
        videos=media(row, columns.videos),
        audios=media(row, columns.audios),
    )
    check_example(example, prompts=description.prompts_only)
    return example


def check_example(example: Example, *, prompts: bool = False) -> None:
    """Check what `Example` promises: the order of roles, and text that can be encoded.

    Args:
        prompts: whether it may be a prompt without an answer.

    Raises:
        ValueError: what is wrong, naming the turn.
    """
    if example.text is not None:
        check_text(example.text, "the text")
        return
    if example.tools:
        check_text(_as_json(example.tools), "the description of the tools")
    if not example.chosen and not example.rejected:
        _check_conversation(example.messages, prompts)
        return
    for name, answer in (("better", example.chosen), ("worse", example.rejected)):
        try:
            _check_conversation((*example.messages, *answer))
        except ValueError as error:
            raise ValueError(f"with the {name} answer: {error}") from None
        if not answer or answer[0].role != "assistant":
            raise ValueError(f"with the {name} answer: it must begin with the assistant")


def check_text(content: str, what: str) -> None:
    """Refuse halves of surrogate pairs, which JSON lets through and no tokenizer takes.

    Raises:
        ValueError: naming `what`.
    """
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is no text: {error}") from None


def _as_json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, default=repr)  # Parquet has dates and bytes, too


# Who may speak after whom; the first is named in messages. Several tools may answer one after another.
_DUE: dict[Role, tuple[Role, ...]] = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_conversation(messages: Sequence[Message], prompts: bool = False) -> None:
    """System at most once and first, then user (or tools) and assistant in turn, ending with the assistant, or with
    what it is to answer."""
    for message in messages:
        check_text(message.content, f"a turn of the {message.role}")
        for call in message.tool_calls:
            check_text(_as_json([call.name, call.arguments]), "a call of a tool")
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    due = _DUE["system"]
    for number, message in enumerate(turns, 1):
        if message.role not in due:
            raise ValueError(
                f"wrong order of roles: turn {number} is from the {message.role} where the {due[0]} is due "
                "(user and assistant take turns, the user first)"
            )
        due = _DUE[message.role]
    if prompts and not turns:
        raise ValueError("has no turn that could be answered")
    if not prompts and (not turns or turns[-1].role != "assistant"):
        raise ValueError("ends without an assistant's answer, so there is nothing to learn")
