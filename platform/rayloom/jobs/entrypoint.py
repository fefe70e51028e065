"""What a job that `ray job submit` started must know about where it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayloom.config.job import JobConfig
from rayloom.config.read import read_job
from rayloom.errors import RequestError
from rayloom.jobs.local_head import STOP_WAIT
from rayloom.pipeline.read import is_pipeline, read_pipeline, written_jobs
from rayloom.train.ray_session import JOB_CONFIG


def lasting_arguments(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The arguments of `rayloom train`, with an `output_dir` that outlives the job.

    The current directory of a Ray job is a copy of the submitter's that Ray deletes, so a relative `output_dir` is
    taken from `~/rayloom` instead.

    Args:
        arguments: options, the job file, overrides.
        environment: of this process.

    Returns:
        The arguments, and what to tell the user.
    """
    words = [argument for argument in arguments if not argument.startswith("-")]
    if JOB_CONFIG not in environment or not words:
        return list(arguments), []
    notes = []
    runtime_env: dict[str, Any] = json.loads(environment[JOB_CONFIG]).get("runtime_env") or {}
    if runtime_env.get("working_dir"):
        try:
            job = _job_of(words[0], words[1:])
        except RequestError:
            return list(arguments), []  # `rayloom train` says it
        output_dir = Path(job.output_dir)
        if job.output_folder is not None and not output_dir.is_absolute() and not str(output_dir).startswith("~"):
            place = f"~/rayloom/{output_dir}"
            arguments = [*arguments, f"output_dir={place}"]
            notes.append(
                f"output_dir: {output_dir} is relative, and the directory of a Ray job is deleted after it; "
                f"the run goes to {Path(place).expanduser()} on the cluster. An absolute path says where"
            )
    (name, seconds), *_ = STOP_WAIT.items()
    if name not in environment:
        notes.append(
            f"stopping this job kills it after 3 s, perhaps without a checkpoint; submit it with `rayloom submit`, "
            f"or with {name}={seconds} among the env_vars of its runtime environment"
        )
    return list(arguments), notes


def _job_of(job_file: str, overrides: Sequence[str]) -> JobConfig:
    """The job, or one that stands for a pipeline's."""
    return (
        written_jobs(read_pipeline(job_file, overrides))[0] if is_pipeline(job_file) else read_job(job_file, overrides)
    )
