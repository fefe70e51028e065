"""A pipeline's file: a job file with `steps`. What stands at its top holds for every step; a step says what is its own.

name: two-steps
model: {path: MODEL}
steps:
  - {name: sft, data: {train: [chats.jsonl]}}
  - {name: dpo, from: sft, data: {train: [pairs.jsonl]}, stage: {type: dpo, reference: cached}}

It is read as it was written, and wired later (`rayloom.pipeline.wire`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayloom.config.document import Document, Location, read_document
from rayloom.config.job import JobConfig
from rayloom.config.read import did_you_mean, key_steps, read_override, set_key, validate_job
from rayloom.errors import RequestError
from rayloom.methods.config import LoraConfig
from rayloom.methods.optimizers.config import AdamWConfig
from rayloom.stages.config import SftConfig

OF_ALL = ("output_dir", "resume", "overwrite", "search")
"""Keys of a job that stand at the top only: of the pipeline as a whole."""
_TYPES = {"method": LoraConfig().type, "stage": SftConfig().type, "optimizer": AdamWConfig().type}
"""Parts of a job whose `type` tells which keys they have, and the type of those that say none."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_OF_STEP = re.compile(r"steps\[(\d+)\]\.(.+)", re.DOTALL)
Change = tuple[str, Any, str]
"""A key as an override writes it, its value, and where that was said."""


@dataclass(frozen=True)
class Step:
    """One step as it was written."""

    name: str
    key: str
    """Where it stands: `steps[1]`."""
    begins: str | None
    """The step whose model it begins at (`from`); None: it begins at its own `model`."""
    own: dict[str, Any]
    """What it says itself."""
    document: Document
    """The job: that and what the top says. Sources of rewards may say `from` instead of `path`; there is no name."""

    def place(self, *location: str | int) -> str:
        """Where one of its keys was written, and the key: `file:12: steps[1].model.path`."""
        key = "".join(f"[{word}]" if isinstance(word, int) else f".{word}" for word in location)
        return f"{self.document.place(location)}: {self.key}{key}"

    @property
    def refers_to(self) -> set[str]:
        """The steps before it that it needs."""
        return {source["from"] for _, source in self.judges()} | ({self.begins} if self.begins is not None else set())

    def judges(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, source) of each source of rewards that is an earlier step's model."""
        rewards = self.document.data.get("rewards")
        sources = rewards.get("sources") if isinstance(rewards, dict) else None
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            if isinstance(source, dict) and "from" in source:
                yield number, source


@dataclass(frozen=True)
class Pipeline:
    """A pipeline as it was written; its steps' jobs have not been checked."""

    top: dict[str, Any]
    """`name`, and of `OF_ALL` what is said."""
    steps: tuple[Step, ...]


def is_pipeline(path: str | Path) -> bool:
    """Whether a file has `steps`. What cannot be read is no pipeline; whoever reads it as a job says why."""
    try:
        return "steps" in read_document(Path(path)).data
    except RequestError:
        return False


def read_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline's file and apply overrides: `steps[1].train.epochs=3` or `steps.dpo.train.epochs=3` of one step,
    `train.epochs=3` of all.

    Raises:
        RequestError: with one message per fault of the steps' names and of what they refer to.
    """
    return pipeline_of(read_pipeline_document(path, overrides))


def read_pipeline_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """A pipeline's file as it was written, with the overrides in it."""
    changes = ((*read_override(override), f"override {override!r}") for override in overrides)
    return with_changes(read_document(Path(path)), changes)


def with_changes(document: Document, changes: Iterable[Change]) -> Document:
    """A pipeline's document with other values of some keys; the given one stays as it is.

    Raises:
        RequestError: there is no such key or step.
    """
    owns = _owns(document)
    top = {key: copy.deepcopy(value) for key, value in document.data.items() if key != "steps"}
    shared = Document(document.name, top, {key: at for key, at in document.places.items() if key[:1] != ("steps",)})
    for key, value, place in changes:
        _apply(key, value, place, shared, owns)
    places = dict(shared.places)
    for number, own in enumerate(owns):
        places["steps", number] = own.name
        places.update({("steps", number, *key): at for key, at in own.places.items()})
    whole = Document(document.name, {**shared.data, "steps": [own.data for own in owns]}, places)
    if ("steps",) in document.places:
        whole.places[("steps",)] = document.places[("steps",)]
    return whole


def pipeline_of(document: Document) -> Pipeline:
    """A pipeline from its document, which stays as it is.

    Raises:
        RequestError: with one message per fault of the steps' names and of what they refer to.
    """
    owns = _owns(document)
    top = {key: value for key, value in document.data.items() if key != "steps"}
    shared = Document(document.name, top, document.places)
    faults: list[str] = []
    if "name" not in shared.data:
        faults.append(f"{document.name}: name is missing")
    steps: list[Step] = []
    for number, own in enumerate(owns):
        try:
            steps.append(_step(number, own, shared, [step.name for step in steps], owns))
        except RequestError as error:
            faults += error.messages
    if faults:
        raise RequestError(*faults)
    return Pipeline({key: shared.data[key] for key in ("name", *OF_ALL) if key in shared.data}, tuple(steps))


def written_jobs(pipeline: Pipeline) -> list[JobConfig]:
    """The steps' jobs as their text tells, for who may not have the files that they name: under the pipeline's name and
    place, each on the model that its line of steps begins with.

    Raises:
        RequestError: one message per fault.
    """
    faults: dict[str, None] = {}
    models: dict[str, Any] = {}
    jobs = []
    for step in pipeline.steps:
        data = {**pipeline.top, **step.document.data}
        if step.begins is not None:
            begun_at, own = models[step.begins], step.own.get("model", {})
            both = isinstance(begun_at, dict) and isinstance(own, dict)
            data["model"] = {**begun_at, **own} if both else begun_at
        models[step.name] = data.get("model")
        if judges := dict(step.judges()):
            sources = [
                {**source, "path": "/"} if number in judges else source
                for number, source in enumerate(data["rewards"]["sources"])
            ]
            for number in judges:
                del sources[number]["from"]
            data["rewards"] = {**data["rewards"], "sources": sources}
        try:
            jobs.append(validate_job(Document(step.document.name, data, step.document.places)))
        except RequestError as error:
            faults |= dict.fromkeys(error.messages)
    if faults:
        raise RequestError(*faults)
    return jobs


def _owns(document: Document) -> list[Document]:
    """What each step says itself, as a document of its own."""
    written, place = document.data["steps"], document.place(("steps",))
    if not isinstance(written, list) or not written:
        found = "an empty list" if isinstance(written, list) else f"{written!r}"
        raise RequestError(f"{place}: steps: must be a list of at least one step, each with a name, not {found}")
    owns = []
    for number, step in enumerate(written):
        start: Location = ("steps", number)
        if not isinstance(step, dict):
            raise RequestError(f"{document.place(start)}: steps[{number}]: must be a mapping of keys, not {step!r}")
        places = {key[2:]: where for key, where in document.places.items() if key[:2] == start and len(key) > 2}
        owns.append(Document(document.place(start), copy.deepcopy(step), places))  # an alias may be two steps' own
    return owns


def _apply(key: str, value: Any, place: str, shared: Document, owns: list[Document]) -> None:
    if key.startswith("steps."):
        own, of_step = _named(key, place, owns)
        set_key(own, of_step, value, place)
        return
    if key.partition("[")[0] == "steps":
        match = _OF_STEP.fullmatch(key)
        if match is None:
            raise RequestError(f"{place}: change a key of one step: steps[1].train.epochs=3, counted from 0")
        if int(match[1]) >= len(owns):
            raise RequestError(f"{place}: there is no step {match[1]}; the pipeline has {len(owns)}, counted from 0")
        set_key(owns[int(match[1])], match[2], value, place)
        return
    set_key(shared, key, value, place)
    for own in owns:  # the command line goes before the file
        if key != "name":
            _forget(own, key_steps(key))


def split_key(key: str, names: Iterable[str]) -> tuple[str, str] | None:
    """(step, its key) of `steps.dpo.train.epochs`; None: there is no such step. A step's name may have dots."""
    words = key.removeprefix("steps.")
    fitting = [name for name in names if words.startswith(f"{name}.")]
    return max(((name, words[len(name) + 1 :]) for name in fitting), key=lambda found: len(found[0]), default=None)


def _named(key: str, place: str, owns: list[Document]) -> tuple[Document, str]:
    names = [str(own.data.get("name")) for own in owns]
    found = split_key(key, names)
    if found is None:
        name = key.split(".")[1]
        raise RequestError(f"{place}: there is no step {name!r}{did_you_mean(name, names)}")
    return owns[names.index(found[0])], found[1]


def _forget(document: Document, steps: list[str | int]) -> None:
    """Remove a key, if it is there."""
    target: Any = document.data
    for step in steps[:-1]:
        is_there = isinstance(step, str) and isinstance(target, dict) and step in target
        if not is_there:
            return
        target = target[step]
    if isinstance(target, dict):
        target.pop(steps[-1], None)


def _step(number: int, own: Document, shared: Document, before: list[str], owns: list[Document]) -> Step:
    key = f"steps[{number}]"
    begins = own.data.pop("from", None)
    name = own.data.pop("name", None)
    if name is None:
        raise RequestError(f"{own.name}: {key}.name is missing")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{own.place(('name',))}: {key}.name: {name!r} must start with a letter or digit and hold only letters, "
            "digits, '.', '-' and '_', 80 at most"
        )
    titled = Document(f"{own.name} (step {name})", own.data, own.places)
    top = {word: value for word, value in shared.data.items() if word not in ("name", *OF_ALL)}
    step = Step(name, key, begins, own.data, _merged(Document(shared.name, top, shared.places), titled))
    faults = []
    if name in before:
        faults.append(f"{step.place('name')}: there are two steps of the name {name!r}; give one another name")
    for word in OF_ALL:
        if word in own.data:
            faults.append(f"{step.place(word)}: the pipeline has one for all of its steps; say it at the top")
    later = [other.data.get("name") for other in owns[number + 1 :]]
    references: list[tuple[str, Any]] = [(step.place("from"), begins)] if begins is not None else []
    references += [(step.place("rewards", "sources", index, "from"), source["from"]) for index, source in step.judges()]
    for place, reference in references:
        if fault := _reference_fault(reference, name, before, later):
            faults.append(f"{place}: {fault}")
    if faults:
        raise RequestError(*faults)
    return step


def _reference_fault(reference: Any, name: str, before: list[str], later: list[Any]) -> str | None:
    if reference in before:
        return None
    if reference == name:
        return f"{name!r} is the step itself; name one before it"
    if reference in later:
        return f"step {reference!r} comes later; name one before this step, or move that one up"
    if not before:
        return f"there is no step {reference!r} before this one, which is the first; leave it out"
    return f"there is no step {reference!r}{did_you_mean(str(reference), before)}"


def _merged(under: Document, over: Document) -> Document:
    """What both say; where both say something, `over`."""
    kept = dict(under.data)
    for part, usual in _TYPES.items():
        below, above = kept.get(part), over.data.get(part)
        if isinstance(below, dict) and isinstance(above, dict):
            kind = below.get("type", usual)
            if above.get("type", kind) != kind:  # the keys of another type
                del kept[part]
    return Document(over.name, _merged_data(kept, over.data), {**under.places, **over.places})


def _merged_data(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merged_data(below, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return merged
