"""A job that is submitted again when it has failed, and goes on in its run directory."""

from __future__ import annotations

from collections.abc import Callable

from rayloom.jobs.client import Job, JobsClient, job_status
from rayloom.jobs.submit import PreparedJob, Submission, send

_WRONG_REQUEST = 2


def run_to_end(
    client: JobsClient,
    job: PreparedJob,
    *,
    retries: int,
    follow: Callable[[Submission], None],
    say: Callable[[str], None],
) -> Job:
    """Submit a job and wait until it has ended; after a failure submit it again, `retries` times at most.

    A job that was stopped has not failed, and a request that was wrong would be wrong again.

    Args:
        follow: returns when the submission has ended.

    Returns:
        The last submission, as it ended.

    Raises:
        RequestError: a job of this run is at work already.
        JobError: the cluster did not take the job, or does not answer any more.
    """
    for attempt in range(1, retries + 2):
        submission = send(client, job, attempt=attempt)
        follow(submission)
        ended = job_status(client, submission.id)
        if ended.status != "FAILED" or ended.exit_code == _WRONG_REQUEST or attempt > retries:
            break
        say(f"{ended.id}  FAILED: {_why(ended)}; submitting it again, retry {attempt} of {retries}")
    return ended


def _why(job: Job) -> str:
    if job.exit_code is not None:
        return f"exit status {job.exit_code}"
    return job.message.strip().splitlines()[0] if job.message.strip() else "its driver is gone"
