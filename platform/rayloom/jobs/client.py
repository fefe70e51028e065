"""The Jobs API of a Ray cluster: which cluster, what runs on it, what a job writes, and how it is stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from rayloom.errors import JobError, RequestError

_CONNECT_SECONDS = 4.0
_HELLO_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
_UPLOAD_SECONDS = 600.0
# A connection that says nothing for so long is opened anew: it may be dead without having been closed.
_SILENCE_SECONDS = 60.0
_LOST_SECONDS = 60.0
_ADDRESS = "RAY_API_SERVER_ADDRESS"


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it."""

    id: str
    """Submission id."""
    status: str
    """`PENDING`, `RUNNING`, `STOPPED`, `SUCCEEDED` or `FAILED`."""
    name: str
    """The job file's `name`; empty, like `run_dir` and `stage`, where Rayloom did not submit the job."""
    run_dir: str
    stage: str
    commit: str
    """Of the working directory's git repository, with `+changes` where files differ from it; else empty."""
    config_hash: str
    """Changes when a key of the resolved job does; else empty."""
    attempt: int
    """1, and one more for each time that `rayloom submit --retries` has submitted the job again."""
    entrypoint: str
    """The shell command that the job runs."""
    message: str
    """What Ray says about the status; for a failed job it ends with the last lines of the log."""
    started: datetime | None
    ended: datetime | None
    exit_code: int | None
    """Exit status of the command, once it has ended by itself: Rayloom's 0, 1 or 2."""

    @property
    def ended_for_good(self) -> bool:
        """Whether the status is one that stays."""
        return JobStatus(self.status).is_terminal()


class JobsClient(JobSubmissionClient):
    """Ray's client, with a time limit on every call."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        answer = _HELLO_SECONDS if endpoint == "/api/version" else _ANSWER_SECONDS
        options.setdefault("timeout", (_CONNECT_SECONDS, _UPLOAD_SECONDS if method == "PUT" else answer))
        return super()._do_request(method, endpoint, **options)


def connect(address: str | None = None, *, environment: Mapping[str, str] | None = None) -> JobsClient:
    """Open the Jobs API at `address`, else at what RAY_API_SERVER_ADDRESS or RAY_ADDRESS (if http) names.

    RAY_AUTH_MODE=disabled sends no token and RAY_AUTH_MODE=token must find one; where it is not set, a token is sent if
    there is one. It is taken from RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or Ray's own file in the
    home folder.

    Args:
        environment: where these variables are looked up; by default this process's.

    Raises:
        RequestError: no address, nobody there, or a token that is missing or refused; within 10 seconds.
    """
    environment = os.environ if environment is None else environment
    address = _address(address, environment)
    token = _token(environment)
    _quieten()
    with _translated(address), _only_address(address):
        try:
            return JobsClient(address, headers={"Authorization": f"Bearer {token}"} if token else {})
        except requests.exceptions.InvalidURL:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError):  # the version that it asked for was not told
            raise RequestError(f"{address} answers, but not as a Ray dashboard does; is the address right?") from None


def list_jobs(client: JobsClient) -> list[Job]:
    """Every job that was submitted to the cluster, the oldest first."""
    with speaking_to(client):
        found = client.list_jobs()
    return sorted((_job(item) for item in found if item.submission_id), key=lambda job: str(job.started or ""))


def job_status(client: JobsClient, job_id: str) -> Job:
    """One job.

    Raises:
        RequestError: the cluster has no such job; names those that it has.
    """
    with speaking_to(client):
        try:
            details = client.get_job_info(job_id)
        except RuntimeError as error:
            if "status code 404" not in str(error):
                raise
            details = None
    if details is None or not details.submission_id:
        known = [job.id for job in list_jobs(client)]
        there = f"the latest there: {', '.join(known[-10:])}" if known else "no job was submitted there yet"
        raise RequestError(f"no job {job_id!r} at {client.get_address()}; {there}")
    return _job(details)


def job_logs(client: JobsClient, job_id: str) -> str:
    """All that the job has written up to now.

    Raises:
        RequestError: no such job.
    """
    job_id = job_status(client, job_id).id
    with speaking_to(client):
        return client.get_job_logs(job_id)


def follow_logs(client: JobsClient, job_id: str) -> Iterator[str]:
    """The job's log from its beginning, line by line as it is written, until the job has ended.

    A connection that breaks is opened again; no line is lost or comes twice.

    Raises:
        RequestError: no such job.
        JobError: the cluster did not answer for a minute.
    """
    return _follow(client, job_status(client, job_id).id)


def stop_job(client: JobsClient, job_id: str, *, wait: float = 660.0) -> Job:
    """Ask a job to stop and wait until it has; a Rayloom job saves a checkpoint first.

    A job that has ended already is left as it is; the status of what is returned tells.

    Args:
        wait: seconds; the default is a little more than the job is given before Ray kills it (`STOP_WAIT`).

    Raises:
        RequestError: no such job.
        JobError: it has not ended after `wait` seconds.
    """
    job = job_status(client, job_id)
    deadline = time.monotonic() + wait
    with speaking_to(client):
        if not job.ended_for_good:
            client.stop_job(job.id)
    while not (job := job_status(client, job.id)).ended_for_good:
        if time.monotonic() > deadline:
            raise JobError(
                f"{job.id} was asked to stop and is still {job.status} after {wait:g} s; "
                "it may be saving its checkpoint: ask for its status again"
            )
        time.sleep(0.5)
    return job


@contextmanager
def speaking_to(client: JobsClient) -> Iterator[None]:
    """Around calls of Ray's client: nobody there or a refused token is a `RequestError`, a failure a `JobError`."""
    with _translated(client.get_address()):
        yield


# --- which cluster --------------------------------------------------------------------------------------------------


def _address(address: str | None, environment: Mapping[str, str]) -> str:
    if address:
        origin = "address"
    elif address := environment.get(_ADDRESS):
        origin = _ADDRESS
    elif (address := environment.get("RAY_ADDRESS")) and address.startswith(("http://", "https://")):
        origin = "RAY_ADDRESS"
    else:
        raise RequestError(
            f"which cluster? give the address of its dashboard, or set {_ADDRESS}, for example to http://HOST:8265"
        )
    if not address.startswith(("http://", "https://")):
        raise RequestError(f"{origin}: {address}: the Jobs API is at the dashboard's address, such as http://HOST:8265")
    return address.rstrip("/")


def _token(environment: Mapping[str, str]) -> str | None:
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token", "disabled"):
        raise RequestError(f"RAY_AUTH_MODE: {mode}: must be token or disabled")
    if mode == "disabled":
        return None
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        token = file.read_text().strip()
    except FileNotFoundError:
        token = ""
    except OSError as error:
        raise RequestError(f"the token in {file} cannot be read: {error.strerror or error}") from None
    if not token and (named or mode == "token"):
        raise RequestError(f"RAY_AUTH_TOKEN is not set and there is no token in {file}; set it to the cluster's token")
    return token or None


@contextmanager
def _only_address(address: str) -> Iterator[None]:
    """Ray's client puts the environment above its argument; here the argument counts."""
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADDRESS]
        else:
            os.environ[_ADDRESS] = before


@contextmanager
def _translated(address: str) -> Iterator[None]:
    """What Ray's client and the network raise, as one line that says what to do."""
    try:
        yield
    except AuthenticationError as error:
        missing = "required" in str(error).splitlines()[0]
        reason = "demands a token" if missing else "refuses the token"
        raise RequestError(
            f"{address} {reason}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's"
        ) from None
    except requests.exceptions.SSLError as error:
        raise RequestError(f"{address}: no secure connection: {error}") from None
    except requests.exceptions.Timeout:
        raise RequestError(f"{address} did not answer in time; is this the address of a Ray dashboard?") from None
    except (requests.exceptions.RequestException, ConnectionError) as error:
        detail = "" if isinstance(error, ConnectionError) else f" ({error})"
        raise RequestError(f"cannot reach a Ray dashboard at {address}{detail}") from None
    except RuntimeError as error:
        # Ray's client puts a full stop behind a traceback, on a line of its own.
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
        raise JobError(f"{address}: {lines[-1] if lines else error}") from None


def _quieten() -> None:
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id,
        status=details.status.value,
        name=metadata.get("job_name", "") if "run_dir" in metadata else "",
        run_dir=metadata.get("run_dir", ""),
        stage=metadata.get("stage", ""),
        commit=metadata.get("git_commit", ""),
        config_hash=metadata.get("config_hash", ""),
        attempt=int(metadata["attempt"]) if metadata.get("attempt", "").isdecimal() else 1,
        entrypoint=details.entrypoint,
        message=details.message or "",
        started=_time(details.start_time),
        ended=_time(details.end_time),
        exit_code=details.driver_exit_code,
    )


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000).astimezone() if milliseconds else None


# --- following a log ------------------------------------------------------------------------------------------------


def _follow(client: JobsClient, job_id: str) -> Iterator[str]:
    text = _Joined()
    heard = time.monotonic()
    while True:
        text.reopen()
        for chunk in _tail(client, job_id):
            heard = time.monotonic()
            yield from text.lines(chunk)
        try:
            ended = job_status(client, job_id).ended_for_good
            heard = time.monotonic()
            if ended:
                break
        except (RequestError, JobError) as error:
            if time.monotonic() - heard > _LOST_SECONDS:
                raise JobError(f"lost the log of {job_id}, which may be running still: {error}") from None
        time.sleep(1)
    # What was written between the last chunk and the end; a node that is gone keeps it.
    with suppress(RequestError, JobError):
        text.reopen()
        yield from text.lines(job_logs(client, job_id))
    yield from text.rest()


class _Joined:
    """Text that arrives in chunks, each time from its beginning when the connection is opened again, as lines."""

    def __init__(self) -> None:
        self._seen = self._position = 0
        self._line = ""

    def reopen(self) -> None:
        """What comes next is the text from its beginning."""
        self._position = 0

    def lines(self, chunk: str) -> Iterator[str]:
        """The lines that this chunk completes."""
        new = chunk[max(0, self._seen - self._position) :]
        self._position += len(chunk)
        self._seen = max(self._seen, self._position)
        *complete, self._line = (self._line + new).split("\n")
        yield from complete

    def rest(self) -> Iterator[str]:
        """The last line, if nothing ended it."""
        if self._line:
            yield self._line


def _tail(client: JobsClient, job_id: str) -> Iterator[str]:
    """Chunks of the log over one connection; ends with it, for whatever reason, or when nothing came for long."""
    loop = asyncio.new_event_loop()
    chunks = client.tail_job_logs(job_id)
    try:
        while True:
            try:
                chunk = loop.run_until_complete(asyncio.wait_for(_next(chunks), _SILENCE_SECONDS))
            except (StopAsyncIteration, TimeoutError, RuntimeError, aiohttp.ClientError, OSError):
                return
            yield chunk
    finally:
        # Left by an exception or an interrupt, the connection may be in the middle of a wait.
        if waiting := asyncio.all_tasks(loop):
            for task in waiting:
                task.cancel()
            loop.run_until_complete(asyncio.wait(waiting))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _next(chunks: Any) -> str:
    return await anext(chunks)
