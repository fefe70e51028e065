"""Raw rows -> `Example`. `FORMATS` is the registry: a name, and a function that raises `ValueError` on a bad row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayloom.data.example import Example, Message, Role

Row = dict[str, Any]

_SHAREGPT_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
_OPENAI_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}


def from_alpaca(row: Row) -> Example:
    """`instruction`, optional `input`, `output`; optional `system`, and `history` as a list of (question, answer)."""
    messages = [Message("system", _text(row, "system"))] if row.get("system") else []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"column 'history' must be a list of pairs, not {history!r:.60}")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"column 'history': entry {number} is not a pair of question and answer")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    question = _text(row, "instruction")
    if row.get("input"):
        question += "\n" + _text(row, "input")
    messages += [Message("user", question), Message("assistant", _text(row, "output"))]
    return _in_turn(messages)


def from_sharegpt(row: Row) -> Example:
    """`conversations`: a list of `{from: human|gpt|system, value}`; optional column `system`."""
    return _from_list(row, "conversations", "from", "value", _SHAREGPT_ROLES)


def from_openai(row: Row) -> Example:
    """`messages`: a list of `{role: user|assistant|system, content}`."""
    return _from_list(row, "messages", "role", "content", _OPENAI_ROLES)


FORMATS: dict[str, Callable[[Row], Example]] = {
    "alpaca": from_alpaca,
    "sharegpt": from_sharegpt,
    "openai": from_openai,
}

_TELLING_COLUMN = {"alpaca": "instruction", "sharegpt": "conversations", "openai": "messages"}


def detect_format(row: Row) -> str | None:
    """The format whose telling column the row has, or None."""
    return next((name for name, column in _TELLING_COLUMN.items() if column in row), None)


def telling_columns() -> str:
    """For messages: which column tells which format."""
    return ", ".join(f"{column!r} ({name})" for name, column in _TELLING_COLUMN.items())


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise ValueError(f"has no column {column!r}; its columns are {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[column], str):
        raise ValueError(f"column {column!r} must be text, not {row[column]!r:.60}")
    return row[column]


def _from_list(row: Row, column: str, role_key: str, text_key: str, roles: dict[str, Role]) -> Example:
    if column not in row:
        raise ValueError(f"has no column {column!r}; its columns are {', '.join(map(repr, row)) or 'none'}")
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column {column!r} must be a list of turns with at least one turn")
    messages = [Message("system", _text(row, "system"))] if row.get("system") else []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise ValueError(f"column {column!r}: turn {number} must have {role_key!r} and {text_key!r}")
        if not isinstance(turn[role_key], str) or turn[role_key] not in roles:
            known = ", ".join(roles)
            raise ValueError(f"column {column!r}: turn {number} has the role {turn[role_key]!r}; known are {known}")
        if not isinstance(turn[text_key], str):
            raise ValueError(f"column {column!r}: turn {number}: {text_key!r} must be text")
        messages.append(Message(roles[turn[role_key]], turn[text_key]))
    return _in_turn(messages)


def _in_turn(messages: list[Message]) -> Example:
    """Check the order of roles: system at most once and first, then user, assistant, user, assistant ..."""
    for message in messages:
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a turn of the {message.role} is no text: {error}") from None
    turns = messages[1:] if messages[0].role == "system" else messages
    for number, message in enumerate(turns, 1):
        expected: Role = "user" if number % 2 else "assistant"
        if message.role != expected:
            raise ValueError(
                f"wrong order of roles: turn {number} is from the {message.role} where the {expected} is due "
                "(user and assistant take turns, the user first)"
            )
    if not turns or turns[-1].role != "assistant":
        raise ValueError("ends without an assistant's answer, so there is nothing to learn")
    return Example(tuple(messages))
