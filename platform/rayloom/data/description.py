"""What the columns of a data set mean, and LlamaFactory's `dataset_info.json`, which says it of many sets at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from rayloom.config.part import ConfigPart, Whole
from rayloom.errors import RequestError

Name = Annotated[str, Field(min_length=1)]


class Columns(ConfigPart):
    """The names of the columns. Where any is given, those that are not given are not read."""

    prompt: Name | None = "instruction"
    """alpaca: what the user asks. text: the text, where `text` is not given."""
    query: Name | None = "input"
    """alpaca: what the question is about; goes below the prompt. A row may leave it empty."""
    response: Name | None = "output"
    """alpaca: the answer; with `ranking` and without `chosen`, a list of two answers, the better one first."""
    history: Name | None = "history"
    """alpaca: earlier turns, a list of pairs of question and answer. A row may leave it empty."""
    messages: Name | None = None
    """sharegpt, openai: the list of turns. Left out: `conversations` in sharegpt, `messages` in openai."""
    system: Name | None = "system"
    """The system text. A row may leave it empty."""
    tools: Name | None = "tools"
    """The functions that the assistant may call: a list of JSON schemas, or the JSON text of one. A row may leave it
    empty."""
    images: Name | None = None
    """Images of the row, one or a list. A row may leave it empty."""
    videos: Name | None = None
    """Videos of the row, one or a list. A row may leave it empty."""
    audios: Name | None = None
    """Sounds of the row, one or a list. A row may leave it empty."""
    chosen: Name | None = "chosen"
    """With `ranking`: the better answer. Text; in sharegpt and openai also a turn, or a list of turns."""
    rejected: Name | None = "rejected"
    """With `ranking`: the worse answer, written like `chosen`."""
    kto_tag: Name | None = None
    """Whether the answer is a desirable one (true or false), for KTO."""
    text: Name | None = "text"
    """text: the plain text."""

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_given(cls, value: Any) -> Any:
        if isinstance(value, dict) and value:
            return {**dict.fromkeys(cls.model_fields), **value}
        return value


class Tags(ConfigPart):
    """The words with which sharegpt and openai mark a turn."""

    role_tag: Name | None = None
    """Key of a turn's role. Left out: `from` in sharegpt, `role` in openai."""
    content_tag: Name | None = None
    """Key of a turn's text. Left out: `value` in sharegpt, `content` in openai."""
    user_tag: Name | None = None
    """Role of the user. Left out: `human` in sharegpt, `user` in openai."""
    assistant_tag: Name | None = None
    """Role of the assistant. Left out: `gpt` in sharegpt, `assistant` in openai."""
    observation_tag: Name | None = None
    """Role of a tool's answer. Left out: `observation` in sharegpt, `tool` in openai."""
    function_tag: Name | None = None
    """Role of a turn whose text is JSON: one call of a function, or a list of them. Left out: `function_call` in
    sharegpt, none in openai, where `tool_calls` of the assistant hold them."""
    system_tag: Name | None = None
    """Role of the system text. Left out: `system`."""


class Description(ConfigPart):
    """What the columns of a data set mean."""

    format: Name = "auto"
    """What a row looks like: `alpaca`, `sharegpt`, `openai`, `text`, a name in the file `data.converters`, or `auto`:
    told from the columns of the first row."""
    ranking: bool = False
    """Whether a row holds two answers, a better one and a worse one."""
    prompts_only: bool = False
    """Whether a row may be a prompt without an answer, for stage ppo; an answer that is there goes to the rewards."""
    columns: Columns = Columns()
    """Which column is what. Left out: the names that the format usually has."""
    tags: Tags = Tags()
    """How sharegpt and openai mark a turn. Left out: as the format usually does."""

    @model_validator(mode="after")
    def _one_kind_of_judgement(self) -> Description:
        if self.ranking and self.columns.kto_tag:
            raise ValueError("`ranking` (two answers) and `columns.kto_tag` (one judged answer) exclude each other")
        if self.prompts_only and (self.ranking or self.columns.kto_tag):
            raise ValueError("`prompts_only` (no answer) and `ranking` or `columns.kto_tag` exclude each other")
        return self


Source = Literal["hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name"]

# In LlamaFactory's priority: the first that is given and can be read is the one.
_READABLE: tuple[Source, ...] = ("hf_hub_url", "cloud_file_name", "file_name")
_UNREADABLE: dict[Source, str] = {
    "ms_hub_url": "on ModelScope",
    "om_hub_url": "on Modelers",
    "script_url": "through a loading script",
}


class DescribedSet(ConfigPart):
    """One entry of a `dataset_info.json`."""

    file: str
    """The description file, for messages."""
    name: str
    source: Source
    """Which key of the entry `address` is from."""
    address: str
    """`hf_hub_url`: the set's name on the Hugging Face hub; `cloud_file_name`: an `s3://` or `gs://` address;
    `file_name`: the path of a file or folder, from the description file's folder on."""
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    """Use so many rows; None: all."""
    description: Description

    @property
    def refusal(self) -> str | None:
        """Why the set cannot be read and what would help, or None: it can."""
        if self.source not in _UNREADABLE:
            return None
        return (
            f"{self.file}: {self.name!r} is to be had only {_UNREADABLE[self.source]} "
            f"({self.source}: {self.address}), which cannot be read; give one of {', '.join(_READABLE)} as well"
        )


class _Entry(ConfigPart):
    """The keys of an entry as LlamaFactory has them."""

    hf_hub_url: Name | None = None
    ms_hub_url: Name | None = None
    om_hub_url: Name | None = None
    script_url: Name | None = None
    cloud_file_name: Name | None = None
    file_name: Name | None = None
    formatting: Name = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: Name = "train"
    folder: str | None = None
    num_samples: Whole | None = Field(default=None, ge=1)
    columns: Columns = Columns()
    tags: Tags = Tags()

    @model_validator(mode="after")
    def _has_a_source(self) -> _Entry:
        if not any(getattr(self, key) for key in (*_READABLE, *_UNREADABLE)):
            raise ValueError(f"does not say where its rows are; give one of {', '.join(_READABLE)}")
        return self


def read_descriptions(path: str | Path) -> dict[str, DescribedSet]:
    """Read a `dataset_info.json`, or the one in a folder: the sets by name, in the order of the file.

    Raises:
        RequestError: no such file, not JSON (with line), or entries that are wrong: one message for each fault.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "dataset_info.json"
    sets, faults = {}, []
    for name, value in _read_json(file).items():
        try:
            sets[name] = _described_set(file, name, _Entry.model_validate(value))
        except ValidationError as error:
            faults += [f"{file}: {name!r}: {message}" for message in _messages(error)]
    if faults:
        raise RequestError(*faults)
    return sets


def _described_set(file: Path, name: str, entry: _Entry) -> DescribedSet:
    source = next(key for key in (*_READABLE, *_UNREADABLE) if getattr(entry, key))
    address = getattr(entry, source)
    return DescribedSet(
        file=str(file),
        name=name,
        source=source,
        address=str(file.parent / address) if source == "file_name" else address,
        subset=entry.subset,
        split=entry.split,
        folder=entry.folder,
        num_samples=entry.num_samples,
        description=Description(
            format="text" if entry.formatting == "alpaca" and _is_plain_text(entry) else entry.formatting,
            ranking=entry.ranking,
            columns=entry.columns,
            tags=entry.tags,
        ),
    )


def _is_plain_text(entry: _Entry) -> bool:
    """LlamaFactory has no format for plain text: it is an alpaca set of questions without answers."""
    columns = entry.columns
    return columns.prompt is not None and columns.response is None and not entry.ranking


def _read_json(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RequestError(f"{file}: no such description file; give a dataset_info.json or its folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: cannot be read as text: {error}") from None
    try:
        data = json.loads(text, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        raise RequestError(f"{file}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file}: {error}") from None
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise RequestError(f"{file}: a description file is an object of data sets by name; this is a {kind}")
    return data


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"key {key!r} stands twice in one object; give each data set another name")
        data[key] = value
    return data


_WORDS = {
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "greater_than_equal": "must be at least 1",
    "model_type": "must be an object",
}


def _messages(error: ValidationError) -> Iterator[str]:
    """One message for each wrong key of an entry."""
    for fault in error.errors(include_url=False):
        *above, last = fault["loc"] or ("",)
        key = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            parts: dict[str, type[BaseModel]] = {"columns": Columns, "tags": Tags}
            known = list((parts[str(above[0])] if above else _Entry).model_fields)
            near = difflib.get_close_matches(str(last), known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            yield f"unknown key {key!r}; {hint}"
        elif fault["type"] == "value_error":
            yield str(fault["ctx"]["error"])
        else:
            text = f"{_WORDS.get(fault['type'], fault['msg'])}, not {fault['input']!r:.60}"
            yield f"{key}: {text}" if key else text
