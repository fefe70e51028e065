"""Raw rows -> `Example`. `FORMATS` is the registry: a name, and a function that raises `ValueError` on a bad row."""

from __future__ import annotations

from rayloom.data.formats.alpaca import from_alpaca
from rayloom.data.formats.chat import from_openai, from_sharegpt
from rayloom.data.formats.converters import load_converters
from rayloom.data.formats.detect import detect_format, telling_columns
from rayloom.data.formats.fields import Converter, Row
from rayloom.data.formats.text import from_text

FORMATS: dict[str, Converter] = {
    "alpaca": from_alpaca,
    "sharegpt": from_sharegpt,
    "openai": from_openai,
    "text": from_text,
}

__all__ = ["FORMATS", "Converter", "Row", "detect_format", "load_converters", "telling_columns"]
