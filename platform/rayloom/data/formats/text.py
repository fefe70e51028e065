"""Plain text, to be learnt as it is."""

from __future__ import annotations

from rayloom.data.description import Description
from rayloom.data.example import Example
from rayloom.data.formats.fields import Row, check_text, media, text


def from_text(row: Row, description: Description) -> Example:
    """The text in column `text`, or in `prompt`, where LlamaFactory's descriptions name it."""
    columns = description.columns
    column = columns.text or columns.prompt or "text"
    content = text(row, column)
    check_text(content, f"column {column!r}")
    return Example(
        text=content,
        images=media(row, columns.images),
        videos=media(row, columns.videos),
        audios=media(row, columns.audios),
    )
