"""What a Ray job says of itself, whoever submits it: `rayloom jobs list` reads it."""

from __future__ import annotations

import hashlib

import rayloom
from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job


def job_metadata(job: JobConfig) -> dict[str, str]:
    """Name, run directory, stage, a hash of the resolved job, and Rayloom's version."""
    return {
        "job_name": job.name,
        "run_dir": job.run_place,
        "stage": job.stage.type,
        "config_hash": hashlib.sha256(dump_job(job).encode()).hexdigest()[:12],
        "rayloom": rayloom.__version__,
    }
