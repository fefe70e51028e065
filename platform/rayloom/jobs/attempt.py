"""Entry point of a job that is started again after a failure: `python -m rayloom.jobs.attempt JOB.yaml [KEY=VALUE]...`.

KubeRay's operator starts the same command again after a failure, and after Kueue has suspended and resumed the job,
each time in a new cluster; `rayloom submit --retries` submits it again. So it asks the run directory: what this very
job began, it goes on with; a run that is finished, or another job's, is left as it is, and `rayloom train` refuses.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job, read_job
from rayloom.errors import RequestError
from rayloom.pipeline.read import Pipeline, is_pipeline, read_pipeline
from rayloom.train.run_dir import find_run


def attempt_override(job: JobConfig) -> str | None:
    """`resume=true` where this job left a checkpoint, `overwrite=true` where it left none; else None.

    Raises:
        RequestError: the checkpoints in the run directory cannot be read.
    """
    run = find_run(job)
    try:
        is_own = dump_job(read_job(run.path / "job.yaml")) == dump_job(job)
    except RequestError:  # there is none, or it is of another version
        is_own = False
    if not is_own or run.result().get("status") == "finished":
        return None
    if job.stage.type == "spin":  # which looks after its rounds itself
        return "resume=true"
    return "resume=true" if run.latest_checkpoint() else "overwrite=true"


def pipeline_override(pipeline: Pipeline) -> str | None:
    """`resume=true` where a step of this pipeline has begun; else None. Which step it is, is in its directory's name.

    Raises:
        RequestError: a step's job is wrong.
    """
    from rayloom.pipeline.plan import plan_pipeline

    has_begun = any(step.job.run_dir.exists() for step in plan_pipeline(pipeline).steps)
    return "resume=true" if has_begun else None


def attempt_overrides(job_file: str, overrides: Sequence[str]) -> tuple[list[str], str | None]:
    """The overrides of this attempt, and what it has found of those before. Where there is nothing of theirs, it is the
    first one's wish whether something older goes on or is overwritten."""
    lasting = [override for override in overrides if not override.startswith(("resume=", "overwrite="))]
    try:
        if is_pipeline(job_file):
            found = pipeline_override(read_pipeline(job_file, lasting))
        else:
            found = attempt_override(read_job(job_file, lasting))
    except RequestError:
        found = None  # `rayloom train` says it
    return ([*lasting, found] if found else list(overrides)), found


if __name__ == "__main__":
    job_file, *given = sys.argv[1:]
    overrides, found = attempt_overrides(job_file, given)
    if found:
        print(f"this job has begun before: {found}", flush=True)
    # In this process's place, so that signals reach it.
    os.execv(sys.executable, [sys.executable, "-m", "rayloom", "train", job_file, *overrides])
