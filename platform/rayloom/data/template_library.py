"""The library of chat templates by name, for models that have none of their own.

`templates/templates.yaml` is the list. An entry names a `.jinja` file, which several entries may share, and what is set
in it: the settings become `{% set %}` statements before the file's text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class NamedTemplate:
    """One entry of `templates.yaml`."""

    name: str
    aliases: tuple[str, ...]
    text: str
    """The Jinja text, settings and all."""


@lru_cache(maxsize=1)
def _library() -> tuple[NamedTemplate, ...]:
    folder = resources.files("rayloom.data") / "templates"
    entries: dict[str, dict[str, Any]] = yaml.safe_load((folder / "templates.yaml").read_text(encoding="utf-8"))
    library = []
    for name, entry in entries.items():
        settings = [
            # JSON's texts, numbers and booleans are Jinja's too.
            f"{{%- set {key} = {json.dumps(value, ensure_ascii=False)} -%}}\n"
            for key, value in entry.get("set", {}).items()
        ]
        text = "".join(settings) + (folder / entry["file"]).read_text(encoding="utf-8")
        library.append(NamedTemplate(name, tuple(entry.get("aliases", ())), text))
    return tuple(library)


def template_names() -> list[tuple[str, tuple[str, ...]]]:
    """Each template's name and the other names it goes by, in the library's order."""
    return [(entry.name, entry.aliases) for entry in _library()]


def known_names() -> list[str]:
    """All names and aliases, those of models with templates of their own too."""
    return [name for entry in _library() for name in (entry.name, *entry.aliases)] + list(own_names())


@lru_cache(maxsize=1)
def own_names() -> tuple[str, ...]:
    """LlamaFactory's names of families whose models all ship a template: they stand for the model's own."""
    return tuple((resources.files("rayloom.data") / "templates" / "own.txt").read_text(encoding="utf-8").split())


def library_template(name: str) -> str | None:
    """The Jinja text that goes by a name or alias; None: there is none."""
    return next((entry.text for entry in _library() if name in (entry.name, *entry.aliases)), None)
