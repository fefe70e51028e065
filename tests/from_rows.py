"""The formats as functions of a row, for tests."""

from __future__ import annotations

from typing import Any

from rayloom.data.description import Description
from rayloom.data.example import Example
from rayloom.data.formats import FORMATS

PLAIN = Description()


def from_alpaca(row: dict[str, Any], description: Description = PLAIN) -> Example:
    """A row of alpaca, by default with the usual columns."""
    return FORMATS["alpaca"](row, description)


def from_sharegpt(row: dict[str, Any], description: Description = PLAIN) -> Example:
    """A row of sharegpt, by default with the usual columns."""
    return FORMATS["sharegpt"](row, description)


def from_openai(row: dict[str, Any], description: Description = PLAIN) -> Example:
    """A row of openai, by default with the usual columns."""
    return FORMATS["openai"](row, description)
