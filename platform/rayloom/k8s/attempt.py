"""Entry point of a RayJob: `python -m rayloom.k8s.attempt JOB.yaml`.

The operator starts the same command again after a failure, and after Kueue has suspended and resumed the job, each time
in a new cluster. So it asks the run directory: what this very job began, it goes on with; a run that is finished, or
another job's, is left as it is, and `rayloom train` refuses.
"""

from __future__ import annotations

import os
import sys

from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job, read_job
from rayloom.errors import RequestError
from rayloom.train.run_dir import find_run


def attempt_override(job: JobConfig) -> str | None:
    """`resume=true` where this job left a checkpoint, `overwrite=true` where it left none; else None.

    Raises:
        RequestError: the checkpoints in the run directory cannot be read.
    """
    run = find_run(job)
    try:
        is_own = (run.path / "job.yaml").read_text(encoding="utf-8") == dump_job(job)
    except OSError:
        is_own = False
    if not is_own or run.result().get("status") == "finished":
        return None
    return "resume=true" if run.latest_checkpoint() else "overwrite=true"


if __name__ == "__main__":
    (job_file,) = sys.argv[1:]
    try:
        override = attempt_override(read_job(job_file))
    except RequestError:
        override = None  # `rayloom train` says it
    if override:
        print(f"this job has begun before: {override}", flush=True)
    # In this process's place, so that signals reach it.
    os.execv(sys.executable, [sys.executable, "-m", "rayloom", "train", job_file, *([override] if override else [])])
