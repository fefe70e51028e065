"""YAML read with the line of every key, so that a message can point at it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rayloom.errors import RequestError

Location = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats: `1e-4` is a number, not a string."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart: quotes text that the loader would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
        list("-+0123456789."),
    )


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    """Quoted where PyYAML would write a line break of Unicode as it is, and read it as another one."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)

_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


@dataclass
class Document:
    """Plain data and where each part of it was written (`job.yaml:12`, or the override's text)."""

    name: str
    data: dict[str, Any]
    places: dict[Location, str] = field(default_factory=dict)

    def place(self, location: Location) -> str:
        """Where `location`, or the nearest part of the document that holds it, was written."""
        for length in range(len(location), 0, -1):
            if location[:length] in self.places:
                return self.places[location[:length]]
        return self.name


def parse_value(text: str) -> Any:
    """The value of an override: YAML, so `3`, `1e-4`, `true`, `[a, b]` and `{path: x}` mean what they look like.

    Raises:
        ValueError: the text is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None


def dump_document(data: dict[str, Any]) -> str:
    """Plain data as YAML, one key a line; reading it gives the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_document(path: Path) -> Document:
    """Read a YAML mapping.

    Raises:
        RequestError: no such file, not readable, not YAML (with line and column), a key twice, or not a mapping.
    """
    if path.is_dir():
        raise RequestError(f"{path}: is a folder; give the job's YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"{path}: no such job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read as text: {error}") from None
    places: dict[Location, str] = {}
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            _note_places(root, (), str(path), places, set())
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RequestError(f"{path}{where}: not YAML: {error.problem or error}") from None
    except RecursionError:
        raise RequestError(f"{path}: not YAML: nested too deeply, or an alias stands within its own anchor") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that cannot be, such as 2024-13-45
        raise RequestError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise RequestError(f"{path}: a job file is a mapping of keys such as `name:` and `model:`; this is {found}")
    return Document(str(path), data, places)


def _note_places(
    node: yaml.Node, location: Location, name: str, places: dict[Location, str], seen: set[yaml.Node]
) -> None:
    if node in seen:  # an alias: what it stands for has been noted, and may hold the alias itself
        return
    seen.add(node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
                shown = f"{key.value!r}; put it in quotes" if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise yaml.MarkedYAMLError(problem=f"a key must be text, not {shown}", problem_mark=key.start_mark)
            child = (*location, key.value)
            if child in places:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands here twice", problem_mark=key.start_mark)
            places[child] = f"{name}:{key.start_mark.line + 1}"
            _note_places(value, child, name, places, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            places[(*location, index)] = f"{name}:{value.start_mark.line + 1}"
            _note_places(value, (*location, index), name, places, seen)
