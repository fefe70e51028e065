"""Which format a row has, told from its columns."""

from __future__ import annotations

from typing import Any

from rayloom.data.description import Description
from rayloom.data.formats.fields import Row

_TELLING_COLUMN = {"alpaca": "instruction", "sharegpt": "conversations", "openai": "messages", "text": "text"}


def detect_format(row: Row, description: Description | None = None) -> str | None:
    """The format of a row, from the columns that the description names, else from the telling columns; None: there is
    none of them."""
    columns = (description or Description()).columns
    ranking = description is not None and description.ranking
    if columns.prompt in row:
        asks = columns.response is not None or ranking or (description is not None and description.prompts_only)
        return "alpaca" if asks else "text"
    for column in (columns.messages, columns.chosen if ranking else None):
        if column in row:
            return "openai" if _has_role(row[column]) else "sharegpt"
    for name in ("sharegpt", "openai"):
        if columns.messages is None and _TELLING_COLUMN[name] in row:
            return name
    return "text" if columns.text in row else None


def telling_columns() -> str:
    """For messages: which column tells which format."""
    return ", ".join(f"{column!r} ({name})" for name, column in _TELLING_COLUMN.items())


def _has_role(turns: Any) -> bool:
    """Whether the first turn is written as OpenAI does."""
    first = turns[0] if isinstance(turns, list) and turns else turns
    return isinstance(first, dict) and "role" in first
