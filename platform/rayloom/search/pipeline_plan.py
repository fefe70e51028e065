"""A search over a pipeline before it starts. Its space has keys of one step (`steps.dpo.train.learning_rate`) or of
all (`train.learning_rate`); its metric is the last step's.

<search>/trials/NAME/     a trial: its pipeline's file, and result.json as any pipeline has it
         steps/           the steps' run directories, of all trials: what they have in common is trained once

A step's directory has its content key in its name, so trials find each other's finished steps as a pipeline that runs
again finds its own (`rayloom.pipeline.key`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayloom.config.document import Document, dump_document, read_document
from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.pipeline.plan import PipelinePlan, plan_pipeline
from rayloom.pipeline.read import pipeline_of, split_key, with_changes, written_jobs
from rayloom.search.plan import SearchPlan, check_key, check_searched, drawn_points, listed, look_up, with_values
from rayloom.search.space import Point, corner_points
from rayloom.train.driver import check_parts

STEPS = "steps"
_OF_REQUEST = ("resume", "overwrite")


@dataclass(frozen=True)
class PipelineSearchPlan(SearchPlan):
    """`document` is the pipeline's, and `job` its last step under the pipeline's name and place."""

    names: tuple[str, ...] = ()
    """Of the steps."""

    @property
    def jobs_each(self) -> int:
        return len(self.names)

    def trial_plan(self, point: Point) -> PipelinePlan:
        """A trial's steps as they will run.

        Raises:
            RequestError: these values make no pipeline that can run.
        """
        document, values = self._place(point)
        document.data |= {"name": STEPS, "output_dir": str(self.folder)}
        try:
            plan = plan_pipeline(pipeline_of(document))
            for step in plan.steps:
                check_parts(step.stand_in)
        except RequestError as error:
            raise with_values(values, error) from None
        return plan

    def text(self) -> str:
        return dump_document({key: value for key, value in self.document.data.items() if key not in _OF_REQUEST})

    def changed_since(self, file: Path) -> list[str]:
        before, now = read_document(file).data, {**self.document.data}
        return [key for key in {**before, **now} if key not in _OF_REQUEST and before.get(key) != now.get(key)]

    def best_text(self, point: Point) -> str:
        return self.trial_text(f"{self.job.name}-best", self.job.output_dir, point)

    def trial_text(self, name: str, output_dir: str, point: Point) -> str:
        """The file of a pipeline that repeats a trial."""
        document, _ = self._place(point)
        return dump_document({**document.data, "name": name, "output_dir": output_dir})

    def _place(self, point: Point) -> tuple[Document, Point]:
        data = {key: value for key, value in self.document.data.items() if key not in ("search", *_OF_REQUEST)}
        document = Document(self.document.name, data, dict(self.document.places))
        values: Point = {}
        for entry in self.entries:
            if not entry.when or self._holds(entry.when, document):
                values[entry.key] = point[entry.key]
                place = f"search.space {entry.key!r}"
                document = with_changes(document, [(entry.key, point[entry.key], place)])
        return document, values

    def _holds(self, when: Any, document: Document) -> bool:
        """Whether the steps have such values; a key without a step is asked of the last one."""
        jobs = written_jobs(pipeline_of(document))
        for key, value in when.items():
            name, of_step = split_key(key, self.names) or (self.names[-1], key)
            if look_up(of_step, jobs[self.names.index(name)].model_dump(mode="json")) not in listed(value):
                return False
        return True


def plan_pipeline_search(document: Document) -> tuple[PipelineSearchPlan, list[JobConfig]]:
    """Read a pipeline's search; also jobs of the first trials' steps, as far as they can be checked before.

    Raises:
        RequestError: naming the key, the value and what would be right.
    """
    pipeline = pipeline_of(document)
    jobs = written_jobs(pipeline)
    job, search = jobs[-1], jobs[-1].search
    if search is None:
        raise RequestError(f"{document.name}: there is no search in this pipeline; say search at its top")
    check_searched(job, search)
    if search.scheduler == "population":
        raise RequestError(
            "search.scheduler: population goes on from checkpoints of one job, and a trial of a pipeline is several; "
            "take asha or median, or search over one step's job"
        )
    names = tuple(step.name for step in pipeline.steps)
    spins = [name for name, one in zip(names, jobs, strict=True) if one.stage.type == "spin"]
    if spins:
        raise RequestError(f"step {spins[0]}: stage spin is rounds of jobs of its own, which a search cannot run")
    entries = tuple(search.entries)
    for entry in entries:
        _, of_step = split_key(entry.key, names) or ("", entry.key)
        check_key(entry.key, of_step)
    plan = PipelineSearchPlan(document, job, search, entries, None, names)
    tried = list(corner_points(entries))
    if search.searcher in ("random", "grid"):
        plan = replace(plan, points=drawn_points(plan))
        tried += plan.points or ()
    return plan, [step.stand_in for point in tried for step in plan.trial_plan(point).steps]
