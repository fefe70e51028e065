"""Job file + overrides -> `JobConfig`, or one message for each fault."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from rayloom.config.document import Document, Location, dump_document, parse_value, read_document
from rayloom.config.job import JobConfig
from rayloom.errors import RequestError


def read_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file and apply overrides such as `train.epochs=3` or `data.train[0].weight=0.5`.

    Raises:
        RequestError: with one message per fault, each naming file and line (or the override), key and remedy.
    """
    return validate_job(read_job_document(path, overrides))


def read_job_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """A job file as it was written, with the overrides in it; `validate_job` checks it."""
    document = read_document(Path(path))
    if "steps" in document.data:
        raise RequestError(
            f"{document.place(('steps',))}: steps: this is a pipeline of jobs, which `rayloom train`, `rayloom submit` "
            "and `rayloom tune` run; name a job's file here"
        )
    for override in overrides:
        _apply_override(document, override)
    return document


def validate_job(document: Document) -> JobConfig:
    """Check a document against `JobConfig`; every fault becomes one message of a `RequestError`."""
    try:
        return JobConfig.model_validate(document.data)
    except ValidationError as error:
        raise RequestError(*_messages(document, error)) from None


def dump_job(job: JobConfig) -> str:
    """The resolved job as YAML: every value written out, so that reading it repeats the run."""
    return dump_document(job.model_dump(mode="json"))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean "x"?` for the nearest known word, else the list of what is known."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"


# --- overrides ------------------------------------------------------------------------------------------------------

_KEY = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[[0-9]+\])*")
_STEP = re.compile(r"([^.\[\]]+)|\[([0-9]+)\]")


def _apply_override(document: Document, override: str) -> None:
    key, value = read_override(override)
    set_key(document, key, value, f"override {override!r}")


def read_override(override: str) -> tuple[str, Any]:
    """The key and the value of `key=value`.

    Raises:
        RequestError: it has another form, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise RequestError(
            f"override {override!r}: write it as key=value, for example train.epochs=3 or data.train[0].weight=0.5"
        )
    try:
        return key, parse_value(text)
    except ValueError:
        raise RequestError(f"override {override!r}: the value {text!r} is not YAML") from None


def set_key(document: Document, key: str, value: Any, place: str) -> None:
    """Set a key that is written as an override writes it: `train.epochs`, `data.train[0].weight`.

    Args:
        place: where the value comes from, for messages.

    Raises:
        RequestError: no job has such a key, or the document has no place for it.
    """
    steps = key_steps(key)
    _check_key(key, steps, place)
    target: Any = document.data
    for position, step in enumerate(steps[:-1]):
        _check_step(target, steps[: position + 1], place)
        target = _descend(target, step, isinstance(steps[position + 1], int))
    _check_step(target, steps, place)
    target[steps[-1]] = value
    stale = [known for known in document.places if known[: len(steps)] == tuple(steps)]
    for known in stale:
        del document.places[known]
    document.places[tuple(steps)] = place


def key_steps(key: str) -> list[str | int]:
    """`data.train[0].weight` as the steps from the top of a document."""
    return [int(index or name) if index or name.isdecimal() else name for name, index in _STEP.findall(key)]


def _descend(target: Any, step: str | int, wants_list: bool) -> Any:
    if isinstance(step, int):
        if isinstance(target[step], str):  # a data set that is written as a plain path
            target[step] = {"path": target[step]}
    elif target.get(step) is None:
        target[step] = [] if wants_list else {}
    return target[step]


def _check_step(target: Any, steps: Sequence[str | int], place: str) -> None:
    """Refuse a last step that `target`, where the others lead to, has no place for."""
    index = steps[-1]
    if isinstance(index, str):
        if not isinstance(target, dict):
            raise RequestError(f"{place}: {_dotted(tuple(steps[:-1]))} is not a mapping in the job file")
    elif not isinstance(target, list) or index >= len(target):
        there = len(target) if isinstance(target, list) else 0
        raise RequestError(
            f"{place}: there is no entry {index}; the job file has {there}, counted from 0 "
            "(to replace the list, give all of it: data.train='[{path: a.jsonl}, {path: b.jsonl}]')"
        )


def _check_key(key: str, steps: Sequence[str | int], place: str) -> None:
    """Refuse a key that no job has, before pydantic sees it, in the words of whoever sets it."""
    annotation: Any = JobConfig
    for depth, step in enumerate(steps):
        if isinstance(step, int):
            annotation = next(iter(get_args(annotation)), Any)
            continue
        models = list(_models_in(annotation))
        known = {name: field.annotation for model in models for name, field in model.model_fields.items()}
        if step not in known:
            where = ".".join(map(str, steps[:depth])) or "the job"
            reason = did_you_mean(step, list(known)) if known else ""
            raise RequestError(f"{place}: {where} has no key {step!r}{reason}")
        annotation = known[step]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that an annotation can hold (one, or several in a union)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated, list):
        for part in get_args(annotation):
            yield from _models_in(part)


# --- messages -------------------------------------------------------------------------------------------------------

_KEY_OF_MESSAGE = re.compile(r"[a-z_]+(\.[a-z_]+)+(?=: )")
_WORDS = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_too_long": "must be shorter",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "too_short": "must not be empty",
}


def _messages(document: Document, error: ValidationError) -> list[str]:
    """One message for each place with a fault. Where a value fits none of several types, pydantic has one per type."""
    faults: dict[Location, list[Any]] = {}
    for fault in error.errors(include_url=False):
        faults.setdefault(_location_in(document.data, fault), []).append(fault)
    return [
        _message(document, location, first) + "".join(f"; else it {_expected(fault)}" for fault in others)
        for location, (first, *others) in faults.items()
        if not any(len(deeper) > len(location) and deeper[: len(location)] == location for deeper in faults)
    ]


def _expected(fault: Any) -> str:
    return _WORDS.get(fault["type"], fault["msg"])


def _message(document: Document, location: Location, fault: Any) -> str:
    value = fault["input"]
    kind, context = fault["type"], fault.get("ctx", {})
    key = _dotted(location)
    if kind == "extra_forbidden":
        models = list(_models_at(location[:-1], document.data))
        known = list(dict.fromkeys(name for model in models for name in model.model_fields))
        text = f"unknown key {_dotted(location)!r}{did_you_mean(str(location[-1]), known)}"
        return f"{document.place(location)}: {text}"
    if kind == "missing":
        return f"{document.place(location)}: {key} is missing"
    if kind == "union_tag_invalid":
        known = [word.strip("'") for word in context["expected_tags"].split(", ")]
        text = f"{key}.type: unknown {context['tag']!r}{did_you_mean(str(context['tag']), known)}"
        return f"{document.place((*location, 'type'))}: {text}"
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        text = f"{key}: unknown {value!r}{did_you_mean(str(value), known)}"
        if "known here" not in text:
            text += f" (one of {', '.join(known)})"
    elif kind == "value_error":
        text = f"{key}: {context['error']}" if key else str(context["error"])
        if not key and (named := _KEY_OF_MESSAGE.match(text)):  # about parts that do not fit one another
            location = tuple(key_steps(named[0]))
    elif kind == "string_pattern_mismatch":
        text = f"{key}: {value!r} must start with a letter or digit and hold only letters, digits, '.', '-' and '_'"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        words = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below"}
        bound = next(iter(context.values()))
        text = f"{key}: must be {words.get(kind, 'at most')} {bound:g}, not {value!r}"
    else:
        text = f"{key}: {_expected(fault)}, not {value!r}"
    return f"{document.place(location)}: {text}"


def _location_in(data: Any, fault: Any) -> Location:
    """pydantic's location without the union branches that it weaves in (`method.lora.rank` -> `method.rank`)."""
    cleaned: list[str | int] = []
    for step in fault["loc"]:
        if (isinstance(data, dict) and step in data) or (isinstance(data, list) and isinstance(step, int)):
            cleaned.append(step)
            data = data[step]
    if fault["type"] == "missing":
        cleaned.append(fault["loc"][-1])
    return tuple(cleaned)


def _models_at(location: Location, data: Any) -> Iterator[type[BaseModel]]:
    annotation: Any = JobConfig
    for step in location:
        data = data[step]
        if isinstance(step, int):
            annotation = next(iter(get_args(annotation)), Any)
        else:
            models = list(_models_in(annotation))
            annotation = next((m.model_fields[step].annotation for m in models if step in m.model_fields), Any)
    models = list(_models_in(annotation))
    tag = data.get("type") if isinstance(data, dict) else None
    tagged = [m for m in models if "type" in m.model_fields and tag in get_args(m.model_fields["type"].annotation)]
    yield from tagged or models


def _dotted(location: Location) -> str:
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text
