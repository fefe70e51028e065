"""A search before it starts: its trials' jobs made and checked, so that what can be refused is refused here."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.config.read import key_steps, set_key, validate_job
from rayloom.errors import RequestError
from rayloom.search.config import SearchConfig
from rayloom.search.population import check_population, with_rungs
from rayloom.search.space import Entry, Point, corner_points, points
from rayloom.train.driver import check_parts

TRIALS = "trials"
_NOT_SEARCHED = ("name", "output_dir", "resume", "overwrite", "search")


@dataclass(frozen=True)
class SearchPlan:
    """What a search is made of. It goes to every trial."""

    document: Document
    """The job file as it was written, with its overrides."""
    job: JobConfig
    search: SearchConfig
    entries: tuple[Entry, ...]
    points: tuple[Point, ...] | None
    """What the trials are made with; None where a searcher proposes it."""

    @property
    def folder(self) -> Path:
        """The search's directory."""
        return self.job.run_dir

    @property
    def trials(self) -> int:
        """How many there will be."""
        return self.search.samples if self.points is None else len(self.points)

    def values(self, point: Point) -> Point:
        """Of a point, the keys that are set: those whose conditions hold."""
        return self._place(point)[1]

    def trial_job(self, name: str, point: Point) -> JobConfig:
        """A trial: the whole job with the values of a point and a run directory of its own.

        Raises:
            RequestError: these values make no job.
        """
        job = self._job(name, point)
        return with_rungs(job, self.search) if self.search.scheduler == "population" else job

    def _job(self, name: str, point: Point) -> JobConfig:
        document, values = self._place(point)
        document.data |= {"name": name, "output_dir": str(self.folder / TRIALS)}
        try:
            job = validate_job(document)
            check_parts(job)
        except RequestError as error:
            shown = ", ".join(f"{key} {value}" for key, value in values.items())
            raise RequestError(*(f"search.space: with {shown}: {text}" for text in error.messages)) from None
        return job

    def best_job(self, point: Point) -> JobConfig:
        """A job that repeats a trial, outside of the search."""
        job = self._job(f"{self.job.name}-best", point)
        return job.model_copy(update={"output_dir": self.job.output_dir})

    def _place(self, point: Point) -> tuple[Document, Point]:
        data = {key: value for key, value in self.document.data.items() if key not in ("search", "resume", "overwrite")}
        document = Document(self.document.name, copy.deepcopy(data), dict(self.document.places))
        defaults = self.job.model_dump(mode="json")
        values = {}
        for entry in self.entries:
            if all(_look_up(key, document.data, defaults) in _listed(value) for key, value in entry.when.items()):
                values[entry.key] = point[entry.key]
                set_key(document, entry.key, copy.deepcopy(point[entry.key]), f"search.space {entry.key!r}")
        return document, values


def plan_search(document: Document) -> tuple[SearchPlan, list[JobConfig]]:
    """Read a job file's search; also jobs of the space's corners and of the trials, but for what a searcher proposes.

    Raises:
        RequestError: naming the key, the value and what would be right.
    """
    job = validate_job(document)
    search = job.search
    if search is None:
        raise RequestError(f"{document.name}: there is no search in this job; say search: {{metric: ..., space: ...}}")
    _check_searched(job, search)
    entries = tuple(search.entries)
    for entry in entries:
        if str(key_steps(entry.key)[0]) in _NOT_SEARCHED:
            raise RequestError(f"search.space: {entry.key} is the same in all trials; it cannot be searched")
    if search.scheduler == "population":
        check_population(job, search)
    plan = SearchPlan(document, job, search, entries, None)
    corners = list(corner_points(entries))
    jobs = [plan.trial_job(f"{job.name}-corner", point) for point in corners]
    if search.searcher in ("random", "grid"):
        drawn = points(entries, samples=search.samples, seed=search.seed, whole_grid=search.searcher == "grid")
        plan = SearchPlan(document, job, search, entries, tuple(_different(plan, drawn, search.searcher == "grid")))
        jobs += [plan.trial_job(f"{job.name}-trial", point) for point in plan.points or ()]
    if search.scheduler == "population" and plan.trials < 2:
        raise RequestError("search.samples: a population has at least 2 trials, of which one can take over another")
    return plan, jobs


def _different(plan: SearchPlan, drawn: Any, leave_out_same: bool) -> Sequence[Point]:
    """Of a grid's combinations those that make different jobs: a key whose condition does not hold makes none."""
    if not leave_out_same:
        return list(drawn)
    return list({json.dumps(plan.values(point), sort_keys=True): point for point in drawn}.values())


def _check_searched(job: JobConfig, search: SearchConfig) -> None:
    faults = []
    if job.output_folder is None:
        faults.append(f"output_dir: a search needs a folder, and {job.output_dir} is an address")
    if job.stage.type == "spin":
        faults.append("search: stage spin is rounds of jobs, whose metrics a search does not see; search over dpo")
    if search.searcher in ("optuna", "hyperopt") and importlib.util.find_spec(search.searcher) is None:
        faults.append(f"search.searcher: {search.searcher} is not installed; pip install 'rayloom[search]'")
    if search.metric.startswith("eval_"):
        if not job.data.eval and not job.data.held_out:
            faults.append(f"search.metric: {search.metric} needs data.held_out or data.eval to say on what")
        elif search.scheduler != "none" and job.train.eval_steps is None:
            faults.append(
                f"search.scheduler: {search.scheduler} compares trials on their way, and without train.eval_steps "
                f"{search.metric} comes at the end only"
            )
    if faults:
        raise RequestError(*faults)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _look_up(key: str, *documents: Mapping[str, Any]) -> Any:
    """The value of a key in the first document that has it; None: in none."""
    for document in documents:
        value: Any = document
        for step in key_steps(key):
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                break
        else:
            return value
    return None
