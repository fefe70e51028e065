"""`rayloom train` of a file with `steps`: one whole job after the other.

    read.py    file + overrides -> steps as they were written; names and what refers to what
    wire.py    a step + the steps before it -> its job: model, adapters and reward adapters are folders of theirs
    key.py     a job + the files that it names -> the step's key, a part of its run directory's name
    plan.py    all of that, step by step -> jobs
    run.py     jobs -> those that are finished are skipped, one that was begun goes on, the others run

    <output_dir>/<pipeline>/result.json        what each step did, and where its run directory is
    <output_dir>/<pipeline>/<step>-<key>/      the run directory of a step, as that of any job

A step knows nothing of its pipeline: it is a job on folders that others have written, run as `rayloom train` runs it,
with a Ray of its own where there is no cluster. A step that changes has another key, and so another directory: what it
was before stays, and is found again when the change is taken back.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rayloom.config.job import JobConfig
from rayloom.errors import JobError, RequestError
from rayloom.pipeline.plan import PipelinePlan, of_step, plan_pipeline
from rayloom.pipeline.read import Pipeline
from rayloom.pipeline.wire import PlannedStep
from rayloom.train.any_stage import run_any
from rayloom.train.ray_session import prepare_environment
from rayloom.train.run_dir import check_run_dir, find_run, rest_of


def run_pipeline(pipeline: Pipeline, *, started: float, verbose: bool = False) -> dict[str, Any]:
    """Run the steps that are not finished, or until one is told to stop. Returns what `result.json` holds.

    Args:
        started: time of day (seconds) at which the user asked for it.

    Raises:
        RequestError: the request was wrong; told of all steps before the first one starts, as far as it can be.
        JobError: a step failed; those before it are kept.
    """
    prepare_environment()  # what an earlier run has left is read with Ray's help
    plan = plan_pipeline(pipeline)
    left = _left(plan)
    results: list[dict[str, Any]] = []
    for number, step in enumerate(plan.steps, 1):
        title = f"step {number} of {len(plan.steps)}, {step.name}"
        job = left.get(step.name)
        if job is None:
            print(f"{title}: finished before, in {step.job.run_dir}", flush=True)
            results.append(step_summary(step, find_run(step.job).result(), skipped=True))
            continue
        print(f"{title}: {_beginning(step, job)}", flush=True)
        try:
            with of_step(step.name):
                result = run_any(job, started=time.time(), verbose=verbose)
        except JobError as error:
            results.append(step_summary(step, {"status": "failed", "error": str(error)}, skipped=False))
            _write(plan, results, started)
            raise JobError(f"step {step.name}: {error}") from error
        results.append(step_summary(step, result, skipped=False))
        if result["status"] == "stopped":
            break
    return _write(plan, results, started)


def _left(plan: PipelinePlan) -> dict[str, JobConfig]:
    """The jobs that must run, by the names of their steps.

    Raises:
        RequestError: a run directory that may not be written, of all steps; or a job that cannot be right.
    """
    if (plan.folder / "job.yaml").exists():
        raise RequestError(f"output_dir: {plan.folder} is the run directory of a job; give the pipeline another name")
    if plan.resume and plan.overwrite:
        raise RequestError("resume and overwrite exclude each other: one keeps what is there, the other deletes it")
    if plan.resume and not any(step.job.run_dir.exists() for step in plan.steps):
        raise RequestError(f"resume: there is no run of these steps in {plan.folder}; start without resume=true")
    left: dict[str, JobConfig] = {}
    faults: list[str] = []
    for step in plan.steps:
        try:
            with of_step(step.name):
                if (job := _rest(step, plan)) is not None:
                    check_run_dir(job)
                    _check(step)
                    left[step.name] = job
        except RequestError as error:
            faults += error.messages
    if faults:
        raise RequestError(*faults)
    return left


def _rest(step: PlannedStep, plan: PipelinePlan) -> JobConfig | None:
    """What is left of a step under the pipeline's `resume` and `overwrite`; None: nothing."""
    run_dir = step.job.run_dir
    if plan.overwrite:
        return step.job.model_copy(update={"overwrite": run_dir.exists()})
    if find_run(step.job).result().get("status") == "finished":
        if Path(step.model).is_dir():
            return None
        raise RequestError(f"{step.model} is gone, which the finished step has left; overwrite=true trains it again")
    if not plan.resume:
        return step.job
    if step.job.stage.type == "spin":  # which looks after its rounds itself
        return step.job.model_copy(update={"resume": (run_dir / "job.yaml").exists()})
    return rest_of(step.job)


def _check(step: PlannedStep) -> None:
    """Refuse what the job's stand-in tells. Loads torch."""
    if step.stand_in.stage.type == "spin":
        return  # its rounds are jobs that begin with answers
    from rayloom.train.driver import check_job

    check_job(step.stand_in)


def _beginning(step: PlannedStep, job: JobConfig) -> str:
    if job.resume:
        return f"goes on in {job.run_dir}"
    return f"begins at what {step.begins} has trained" if step.begins else "begins"


def step_summary(step: PlannedStep, result: dict[str, Any], *, skipped: bool) -> dict[str, Any]:
    """What a pipeline's `result.json` says of a step.

    Args:
        skipped: it had been finished before.
    """
    told: dict[str, Any] = {
        key: result[key] for key in ("steps", "train_loss", "eval", "seconds", "error") if key in result
    }
    return {
        "name": step.name,
        "key": step.key,
        "run_dir": str(step.job.run_dir),
        "status": result["status"],
        "skipped": skipped,
        **told,
    }


def _write(plan: PipelinePlan, results: list[dict[str, Any]], started: float) -> dict[str, Any]:
    return write_pipeline_result(plan.folder, plan.name, results, started, plan.steps[-1].model)


def write_pipeline_result(
    folder: Path, name: str, results: list[dict[str, Any]], started: float, model: str
) -> dict[str, Any]:
    """Replace a pipeline's `result.json`; returns what it holds.

    Args:
        results: of the steps so far.
        started: time of day, in seconds.
        model: the folder that the last step leaves.
    """
    status = results[-1]["status"]
    whole = {
        "name": name,
        "status": status,
        "steps": sum(result.get("steps", 0) for result in results),
        "pipeline": results,
        "seconds": round(time.time() - started, 2),
        "model_dir": model if status == "finished" else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "result.partial"
    partial.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "result.json")
    return whole
