"""From a pipeline's file to jobs that know their run directories, in the order of the steps. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.config.read import validate_job
from rayloom.errors import RequestError
from rayloom.methods.rules import check_combination
from rayloom.pipeline.key import step_key
from rayloom.pipeline.read import Pipeline, Step
from rayloom.pipeline.wire import PlannedStep, check_base, stand_in, wire
from rayloom.stages.rules import check_stage
from rayloom.train.ppo_rules import check_ppo


@dataclass(frozen=True)
class PipelinePlan:
    """A pipeline whose steps' jobs are right as far as their texts and the files that are there tell."""

    name: str
    folder: Path
    """`<output_dir>/<name>`, absolute: the steps' run directories are in it."""
    resume: bool
    overwrite: bool
    steps: tuple[PlannedStep, ...]


def plan_pipeline(pipeline: Pipeline) -> PipelinePlan:
    """Settle every step's job.

    Raises:
        RequestError: one message per fault, of all steps but those that begin at one with a fault.
    """
    faults: dict[str, None] = {}  # what stands at the top is wrong in each step, and told once
    done: dict[str, PlannedStep] = {}
    whole: JobConfig | None = None
    for step in pipeline.steps:
        if not step.refers_to <= done.keys():
            continue
        try:
            document = wire(step, done)
            data = {**pipeline.top, **document.data}
            whole = validate_job(Document(document.name, data, document.places))
            if whole.output_folder is None:
                raise RequestError(
                    f"output_dir: a pipeline needs a folder, in which its steps find what those before have left, and "
                    f"{whole.output_dir} is an address; give a folder that the machines share"
                )
            with of_step(step.name):
                done[step.name] = _planned(step, whole, done)
        except RequestError as error:
            faults |= dict.fromkeys(error.messages)
    if faults:
        raise RequestError(*faults)
    assert whole is not None  # there is a step
    return PipelinePlan(whole.name, whole.run_dir, whole.resume, whole.overwrite, tuple(done.values()))


@contextmanager
def of_step(name: str) -> Iterator[None]:
    """What is wrong inside is wrong with this step."""
    try:
        yield
    except RequestError as error:
        raise RequestError(*(f"step {name}: {message}" for message in error.messages)) from None


def _planned(step: Step, whole: JobConfig, done: dict[str, PlannedStep]) -> PlannedStep:
    """The step in a run directory of its own.

    Args:
        whole: its job under the pipeline's name and place.
    """
    check_base(step, whole, done)
    for check in (check_combination, check_stage, check_ppo):
        check(whole)
    if whole.stage.type == "spin":
        from rayloom.train.self_play import check_self_play  # loads what engines need

        check_self_play(whole)
    key = step_key(whole, whole.run_dir)
    place = {"name": f"{step.name}-{key}", "output_dir": str(whole.run_dir)}
    of_all = {"resume": False, "overwrite": False, "search": None}
    job = whole.model_copy(update={**place, **of_all})
    return PlannedStep(step.name, step.begins, job, stand_in(step, job, done), key)
