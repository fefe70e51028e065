"""A job of any stage, run to its end."""

from __future__ import annotations

from typing import Any

from rayloom.config.job import JobConfig


def run_any(job: JobConfig, *, started: float, verbose: bool = False) -> dict[str, Any]:
    """What `run_job` does, or of stage spin `run_self_play`, whose rounds are jobs themselves.

    Raises:
        RequestError: the request was wrong.
        JobError: the job failed.
    """
    if job.stage.type == "spin":
        from rayloom.train.self_play import run_self_play as run
    else:
        from rayloom.train.driver import run_job as run
    return run(job, started=started, verbose=verbose)
