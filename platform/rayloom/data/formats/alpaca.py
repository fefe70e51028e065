"""Alpaca: a question, perhaps an input, an answer; perhaps a system message and earlier turns."""

from __future__ import annotations

from rayloom.data.description import Columns, Description
from rayloom.data.example import Example, Message
from rayloom.data.formats.fields import Row, finish, optional_text, text


def from_alpaca(row: Row, description: Description) -> Example:
    """A conversation; with `ranking` a preference, whose two answers stand in `chosen` and `rejected`, or as a list of
    two in `response`."""
    columns = description.columns
    system = optional_text(row, columns.system)
    messages = [Message("system", system)] if system else []
    messages += _history(row, columns.history)
    parts = text(row, columns.prompt or "instruction"), optional_text(row, columns.query)
    messages.append(Message("user", "\n".join(part for part in parts if part)))
    if description.ranking:
        chosen, rejected = _pair(row, columns)
        return finish(row, description, messages, chosen=[chosen], rejected=[rejected])
    response = columns.response or "output"
    answer = optional_text(row, response) if description.prompts_only else text(row, response)
    if answer or not description.prompts_only:
        messages.append(Message("assistant", answer))
    return finish(row, description, messages)


def _history(row: Row, column: str | None) -> list[Message]:
    history = (row.get(column) if column else None) or []
    if not isinstance(history, list):
        raise ValueError(f"column {column!r} must be a list of pairs, not {history!r:.60}")
    messages = []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"column {column!r}: entry {number} is not a pair of question and answer")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def _pair(row: Row, columns: Columns) -> tuple[Message, Message]:
    """The better and the worse answer."""
    response = row.get(columns.response) if columns.response else None
    if isinstance(response, list) and columns.chosen not in row:
        if len(response) != 2 or not all(isinstance(answer, str) for answer in response):
            raise ValueError(f"column {columns.response!r} must be a list of two texts, the better one first")
        chosen, rejected = response
    else:
        chosen, rejected = text(row, columns.chosen or "chosen"), text(row, columns.rejected or "rejected")
    return Message("assistant", chosen), Message("assistant", rejected)
