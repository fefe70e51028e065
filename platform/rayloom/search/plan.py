"""A search before it starts: its trials' jobs made and checked, so that what can be refused is refused here."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job, key_steps, read_job, set_key, validate_job
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
    def jobs_each(self) -> int:
        """How many jobs a trial is."""
        return 1

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
            raise with_values(values, error) from None
        return job

    def text(self) -> str:
        """What the search's directory keeps of the request: `job.yaml`."""
        return dump_job(self.job.model_copy(update={"resume": False, "overwrite": False}))

    def changed_since(self, file: Path) -> list[str]:
        """Keys of the request that are not as such a file says."""
        before, now = read_job(file).model_dump(), self.job.model_copy(update={"resume": False}).model_dump()
        return [key for key in now if now[key] != before[key]]

    def best_text(self, point: Point) -> str:
        """The file of a job that repeats a trial, outside of the search."""
        return dump_job(self.best_job(point))

    def best_job(self, point: Point) -> JobConfig:
        """The job of it."""
        job = self._job(f"{self.job.name}-best", point)
        return job.model_copy(update={"output_dir": self.job.output_dir})

    def _place(self, point: Point) -> tuple[Document, Point]:
        data = {key: value for key, value in self.document.data.items() if key not in ("search", "resume", "overwrite")}
        document = Document(self.document.name, copy.deepcopy(data), dict(self.document.places))
        defaults = self.job.model_dump(mode="json")
        values = {}
        for entry in self.entries:
            if all(look_up(key, document.data, defaults) in listed(value) for key, value in entry.when.items()):
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
    check_searched(job, search)
    entries = tuple(search.entries)
    for entry in entries:
        check_key(entry.key, entry.key)
    if search.scheduler == "population":
        check_population(job, search)
    plan = SearchPlan(document, job, search, entries, None)
    corners = list(corner_points(entries))
    jobs = [plan.trial_job(f"{job.name}-corner", point) for point in corners]
    if search.searcher in ("random", "grid"):
        plan = SearchPlan(document, job, search, entries, drawn_points(plan))
        jobs += [plan.trial_job(f"{job.name}-trial", point) for point in plan.points or ()]
    if search.scheduler == "population" and plan.trials < 2:
        raise RequestError("search.samples: a population has at least 2 trials, of which one can take over another")
    return plan, jobs


def drawn_points(plan: SearchPlan) -> tuple[Point, ...]:
    """What the trials are made with, where no searcher proposes it. Of a grid's combinations those that make different
    jobs: a key whose condition does not hold makes none."""
    search = plan.search
    drawn = points(plan.entries, samples=search.samples, seed=search.seed, whole_grid=search.searcher == "grid")
    if search.searcher != "grid":
        return tuple(drawn)
    return tuple({json.dumps(plan.values(point), sort_keys=True): point for point in drawn}.values())


def with_values(values: Point, error: RequestError) -> RequestError:
    """What is wrong with a trial of these values."""
    shown = ", ".join(f"{key} {value}" for key, value in values.items())
    return RequestError(*(f"search.space: with {shown}: {text}" for text in error.messages))


def check_key(key: str, of_job: str) -> None:
    """Refuse a key that is not a trial's own.

    Args:
        of_job: the key within a job.
    """
    if str(key_steps(of_job)[0]) in _NOT_SEARCHED:
        raise RequestError(f"search.space: {key} is the same in all trials; it cannot be searched")


def check_searched(job: JobConfig, search: SearchConfig) -> None:
    """Refuse what no search can do with a job.

    Raises:
        RequestError: naming the key and what would be right.
    """
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


def listed(value: Any) -> list[Any]:
    """What a condition allows."""
    return value if isinstance(value, list) else [value]


def look_up(key: str, *documents: Mapping[str, Any]) -> Any:
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
