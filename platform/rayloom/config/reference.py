"""The keys of a job file as pages for people: Markdown for the documentation, coloured text for a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from rayloom.config.schema import Key, Section

_WIDTH, _INDENT = 100, 4
_CODE = re.compile(r"`([^`]+)`")


def markdown(sections: Sequence[Section]) -> str:
    """One table for each section."""
    blocks = []
    for section in sections:
        title = f"`{section.name}`" if section.name else "The job"
        variant = f", type `{section.variant}`" if section.variant else ""
        rows = [
            (f"`{key.name}`", key.type, key.default or "required", key.meaning.replace("|", "\\|"))
            for key in section.keys
        ]
        lines = [" | ".join(row) for row in [("key", "type", "default", "meaning"), ("---",) * 4, *rows]]
        blocks.append("\n".join([f"## {title}{variant}", "", section.meaning, "", *(f"| {line} |" for line in lines)]))
    return "\n\n".join(blocks) + "\n"


def show_keys(keys: Sequence[Key], console: Console) -> None:
    """Each key with its type, default and meaning."""
    width = min(console.width, _WIDTH) - _INDENT
    for number, key in enumerate(keys):
        if number:
            console.print()
        default = f"default {key.default}" if key.default else "required"
        console.print(Text(key.name, "bold"), soft_wrap=True)
        for line in (f"{key.type}; {default}", key.meaning):
            lines = _coloured(line, console).wrap(console, width) if console.is_terminal else [_coloured(line, console)]
            for text in lines:
                console.print(Text(" " * _INDENT).append_text(text), soft_wrap=True)


def _coloured(text: str, console: Console) -> Text:
    """What stands between backticks in colour instead; where there is no colour, as it is."""
    if console.color_system is None or console.no_color:
        return Text(text)
    result, end = Text(), 0
    for match in _CODE.finditer(text):
        result.append(text[end : match.start()]).append(match[1], "cyan")
        end = match.end()
    return result.append(text[end:])
