"""What a job file may hold, told from the models: JSON Schema for editors, and a list of keys for people."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError

JsonSchema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class Key:
    """One key of the job file."""

    name: str
    """From the top, as an override writes it: `train.epochs`, `data.train[].weight`."""
    type: str
    default: str
    """As it would stand in the file; empty where the key is required."""
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys of one mapping in the job file."""

    name: str
    """The key that holds the mapping; empty for the job itself."""
    variant: str
    """Where `type` decides which keys there are: the type that these belong to. Else empty."""
    meaning: str
    keys: tuple[Key, ...]


def job_schema() -> JsonSchema:
    """JSON Schema of a job file. What concerns several keys at once (weights under `concat`) only `read_job` tells."""
    schema = _full_schema()
    for part in schema["properties"].values():
        part.pop("discriminator", None)  # OpenAPI's word, which JSON Schema has not
    return schema


def job_reference() -> list[Section]:
    """Every key of a job file, by the mapping that holds it, in the order of the models."""
    schema = _full_schema()
    return list(_sections(schema, "", "", schema["$defs"]))


def find_keys(name: str) -> list[Key]:
    """The key of that name, or all keys of the mapping of that name. List indices may be written or left out.

    Raises:
        RequestError: there is no such key; with the nearest that there is.
    """
    wanted = _without_indices(name)
    sections = job_reference()
    keys = [key for section in sections for key in section.keys]
    below = [key for section in sections if _without_indices(section.name) == wanted for key in section.keys]
    found = below or [key for key in keys if _without_indices(key.name) == wanted]
    if not found:
        names = list(dict.fromkeys(_without_indices(key.name) for key in keys))
        near = [known for known in names if known.rpartition(".")[2] == wanted]
        near = near or difflib.get_close_matches(wanted, names, n=1, cutoff=0.6)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; `rayloom schema --markdown` lists all"
        raise RequestError(f"there is no key {name!r}{hint}")
    return found


def _full_schema() -> JsonSchema:
    """pydantic's schema and what it does not know: what the models' own validators fill in."""
    schema: JsonSchema = _clean(JobConfig.model_json_schema())
    definitions = schema["$defs"]
    sets = definitions["DataConfig"]["properties"]["train"]  # a plain path will do for a data set
    sets["items"] = {"anyOf": [{"type": "string", "minLength": 1}, sets["items"]]}
    for part in schema["properties"].values():
        for tag, name in _variants(part):
            if part.get("default", {}).get("type") not in tag.split(", "):  # without a type it is the default's
                definitions[name]["required"] = ["type", *definitions[name].get("required", [])]
    return {"$schema": DIALECT, "title": "Rayloom job", **schema}


def _clean(value: Any) -> Any:
    """Docstrings on one line; no titles, which would only repeat the keys."""
    if isinstance(value, dict):
        kept = {name: _clean(item) for name, item in value.items() if not (name == "title" and isinstance(item, str))}
        if isinstance(kept.get("description"), str):
            kept["description"] = " ".join(kept["description"].split())
        return kept
    return [_clean(item) for item in value] if isinstance(value, list) else value


def _sections(schema: JsonSchema, name: str, variant: str, definitions: JsonSchema) -> Iterator[Section]:
    """The section of one mapping, then those of the mappings in it."""
    required = schema.get("required", [])
    keys, inner = [], []
    for key, part in schema["properties"].items():
        full = f"{name}.{key}" if name else key
        below = [(full, tag, definitions[ref]) for tag, ref in _parts(part)]
        for option in part.get("items", {}).get("anyOf", []):
            below += [(f"{full}[]", tag, definitions[ref]) for tag, ref in _parts(option)]
        inner += below
        meaning = part.get("description") or below[0][2]["description"]
        default = "" if key in required else _value(part["default"])
        keys.append(
            Key(full, _type(part), "see below" if below and default not in ("", "`null`") else default, meaning)
        )
    yield Section(name, variant, schema["description"], tuple(keys))
    for full, tag, part in inner:
        yield from _sections(part, full, tag, definitions)


def _parts(schema: JsonSchema) -> list[tuple[str, str]]:
    """The definitions that a value of `schema` may be, each with its tag; an only one has none."""
    if "anyOf" in schema:
        return [part for option in schema["anyOf"] for part in _parts(option)]
    return [("", _definition(schema))] if "$ref" in schema else _variants(schema)


def _variants(schema: JsonSchema) -> list[tuple[str, str]]:
    """(its types, definition) of each mapping that a tagged union offers, in the union's order."""
    mapping = schema.get("discriminator", {}).get("mapping", {})
    tags: dict[str, list[str]] = {}
    for tag, reference in mapping.items():
        tags.setdefault(reference, []).append(tag)
    return [(", ".join(tags[option["$ref"]]), _definition(option)) for option in schema.get("oneOf", []) if mapping]


def _definition(schema: JsonSchema) -> str:
    return schema["$ref"].rpartition("/")[2]


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_NAMES = {"string": "text", "integer": "whole number", "number": "number", "null": "`null`"}


def _type(schema: JsonSchema) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return _either([_value(value) for value in schema.get("enum", [schema.get("const")])])
    if schema.get("type") == "boolean":
        return "`true` or `false`"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if schema.get("type") not in _NAMES:
        return "mapping"
    bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema]
    return " ".join([_NAMES[schema["type"]], ", ".join(bounds)]).strip()


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _value(value: Any) -> str:
    """As YAML would have it, between backticks."""
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _without_indices(name: str) -> str:
    return re.sub(r"\[\d*\]", "", name)
