"""What a Ray job says of itself, whoever submits it: `rayloom jobs list` reads it."""

from __future__ import annotations

import hashlib

import rayloom
from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job


def job_metadata(*jobs: JobConfig) -> dict[str, str]:
    """Name, run directory, stage, a hash of the resolved job, and Rayloom's version.

    Args:
        jobs: one; or all of a pipeline, which have its name.
    """
    first = jobs[0]
    return {
        "job_name": first.name,
        "run_dir": first.run_place,
        "stage": ", ".join(job.stage.type for job in jobs),
        "config_hash": hashlib.sha256("".join(map(dump_job, jobs)).encode()).hexdigest()[:12],
        "rayloom": rayloom.__version__,
    }
