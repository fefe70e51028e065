"""`rayloom submit`: the same job as `rayloom train`, run by Ray Jobs from a copy of the working directory.

    prepared: the job's text and files are checked, the copy is made     send: is the run free? -> Ray

A run has one job at a time. What was prepared can be sent again: a retry is another submission of the same copy, which
goes on in the same run directory (`rayloom.jobs.attempt`).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import rayloom
from rayloom.config.job import JobConfig
from rayloom.config.read import read_job
from rayloom.errors import JobError, RequestError
from rayloom.jobs.client import Job, JobsClient, list_jobs, speaking_to
from rayloom.jobs.local_head import STOP_WAIT
from rayloom.jobs.metadata import job_metadata
from rayloom.jobs.package import Package, collect_package
from rayloom.pipeline.read import is_pipeline, read_pipeline, written_jobs

_TRIES = 5  # when others submit jobs of the same name at the same moment


@dataclass(frozen=True)
class DriverResources:
    """What Ray reserves for the job's driver, which holds no model. Nothing: it runs on the head, beside all others."""

    cpus: float | None = None
    memory_gib: float | None = None
    custom: dict[str, float] = field(default_factory=dict)
    """Resources of the cluster's own names."""

    def as_options(self) -> dict[str, Any]:
        """As Ray's client takes them."""
        memory = None if self.memory_gib is None else round(self.memory_gib * 2**30)
        return {
            "entrypoint_num_cpus": self.cpus,
            "entrypoint_memory": memory,
            "entrypoint_resources": self.custom or None,
        }


@dataclass(frozen=True)
class PreparedJob:
    """A job whose text and files are right, and the copy of its working directory."""

    name: str
    run_dir: str
    """The run directory, as the cluster's machines see it, or its address."""
    file: str
    """The job file, in the copy."""
    overrides: tuple[str, ...]
    archive: Path
    package_bytes: int
    """Size of the copy of the working directory."""
    metadata: dict[str, str]
    driver: DriverResources
    notes: tuple[str, ...]
    """What the user should know: what is not as it would be with `rayloom train`."""


@dataclass(frozen=True)
class Submission:
    """What was submitted."""

    id: str
    """Submission id: the job's name, and how many of that name the cluster has had."""
    run_dir: str
    package_bytes: int
    notes: tuple[str, ...]


def submit(
    client: JobsClient,
    job_file: str | Path,
    overrides: Sequence[str] = (),
    *,
    working_dir: str | Path | None = None,
    driver: DriverResources | None = None,
) -> Submission:
    """Check a job here, send its files to the cluster and start it there.

    Args:
        job_file: inside the working directory, like everything that the job names by a relative path.
        working_dir: what the job finds as its current directory; by default the current directory.

    Raises:
        RequestError: the job is wrong, needs a file that the cluster would not get, or a job of this run is at work;
            nothing was submitted.
        JobError: the cluster did not take the job.
    """
    with prepared(job_file, overrides, working_dir=working_dir, driver=driver) as job:
        return send(client, job)


@contextmanager
def prepared(
    job_file: str | Path,
    overrides: Sequence[str] = (),
    *,
    working_dir: str | Path | None = None,
    driver: DriverResources | None = None,
) -> Iterator[PreparedJob]:
    """Check a job, or a pipeline, and make the copy of its working directory, which lasts as long as the block.

    Raises:
        RequestError: the job is wrong, or needs a file that the cluster would not get.
    """
    jobs = (
        written_jobs(read_pipeline(job_file, overrides)) if is_pipeline(job_file) else [read_job(job_file, overrides)]
    )
    folder = Path(os.path.abspath(working_dir or "."))
    if not folder.is_dir():
        raise RequestError(f"working directory: {folder} is no folder")
    package = collect_package(folder, leave_out=_run_folders(jobs[0], folder))
    faults, arguments = [], list(overrides)
    file = _inside(folder, job_file)
    if fault := _missing("job file", file or str(job_file), package):
        faults.append(fault)
    named = dict.fromkeys(pair for job in jobs for pair in _relative_paths(job, folder))
    for key, path in named:
        if fault := _missing(key, path, package):
            faults.append(fault)
    if faults or file is None:
        raise RequestError(*faults)

    notes = []
    if jobs[0].output_folder is not None and not _absolute(jobs[0].output_dir):
        # The job's current directory is a copy that vanishes with it.
        output_dir = Path(os.path.abspath(jobs[0].output_dir))
        arguments.append(_override("output_dir", str(output_dir)))
        jobs = [job.model_copy(update={"output_dir": str(output_dir)}) for job in jobs]
        notes.append(f"output_dir is {output_dir} on the cluster: a place that its machines must share with this one")
    with tempfile.TemporaryDirectory(prefix="rayloom-") as scratch:
        archive = Path(scratch) / "working_dir.zip"
        package.write(archive)
        yield PreparedJob(
            name=jobs[0].name,
            run_dir=jobs[0].run_place,
            file=file,
            overrides=tuple(arguments),
            archive=archive,
            package_bytes=package.size,
            metadata={**job_metadata(*jobs), **_commit(folder)},
            driver=driver or DriverResources(),
            notes=tuple(notes),
        )


def send(client: JobsClient, job: PreparedJob, *, attempt: int = 1) -> Submission:
    """Start a prepared job on the cluster.

    Args:
        attempt: from 2 on the job goes on with what the attempts before have left.

    Raises:
        RequestError: a job of this run is at work already; nothing was submitted.
        JobError: the cluster did not take the job.
    """
    command = ["rayloom", "train"] if attempt == 1 else ["rayloom.jobs.attempt"]
    words = ["python", "-m", *command, job.file, *job.overrides]
    for left in reversed(range(_TRIES)):
        known = list_jobs(client)
        _check_free(job, known)
        job_id = f"{job.name}-{_next_number(job.name, known)}"
        try:
            with speaking_to(client):
                client.submit_job(
                    entrypoint=shlex.join(words),
                    submission_id=job_id,
                    runtime_env={
                        "working_dir": str(job.archive),
                        "py_modules": [str(Path(rayloom.__file__).parent)],
                        "excludes": ["__pycache__"],  # of the package; the archive has been sifted
                        "env_vars": {"PYTHONUNBUFFERED": "1", **STOP_WAIT},
                    },
                    metadata={**job.metadata, "attempt": str(attempt)},
                    **job.driver.as_options(),
                )
        except JobError as error:
            if "already exists" in str(error) and left:
                continue  # somebody else had the same number; perhaps it was this very run
            raise
        break
    return Submission(job_id, job.run_dir, job.package_bytes, job.notes)


def _check_free(job: PreparedJob, known: Sequence[Job]) -> None:
    """Two jobs in one run directory would spoil it."""
    for other in known:
        if other.run_dir == job.run_dir and not other.ended_for_good:
            same = "the same job" if other.config_hash == job.metadata["config_hash"] else "another job"
            raise RequestError(
                f"name: {job.name}: {other.id} is {other.status} already, {same} in the run directory {job.run_dir}; "
                f"nothing was submitted. See it with `rayloom jobs logs --follow {other.id}`, stop it with "
                f"`rayloom jobs stop {other.id}`, or choose another name"
            )


def _next_number(name: str, known: Sequence[Job]) -> int:
    """One above those that jobs of this name have: whoever submits at the same moment takes the same one, and Ray takes
    it once."""
    numbers = [int(match[1]) for other in known if (match := re.fullmatch(rf"{re.escape(name)}-(\d{{1,9}})", other.id))]
    return max(numbers, default=0) + 1


def _relative_paths(job: JobConfig, folder: Path) -> Iterator[tuple[str, str]]:
    """(key, path) of every file and folder that the job names relative to its current directory."""
    paths = [(f"data.train[{index}].path", item.path) for index, item in enumerate(job.data.train)]
    if job.data.template.endswith(".jinja"):
        paths.append(("data.template", job.data.template))
    model = job.model.path
    if model.startswith(".") or (folder / model).is_dir():  # else a hub name or `pypi:`
        paths.append(("model.path", model))
    return ((key, path) for key, path in paths if not _absolute(path))


def _missing(key: str, path: str, package: Package) -> str | None:
    """Why the job would not find `path` (relative to the working directory, or outside of it) on the cluster."""
    clean = os.path.normpath(path)
    if os.path.isabs(clean) or clean.startswith(".."):
        return (
            f"{key}: {path} is outside of the working directory {package.folder}, which is all that the cluster gets; "
            "move it inside, or choose a wider working directory"
            + ("" if key == "job file" else ", or give an absolute path that the cluster's machines can read")
        )
    if not (package.folder / clean).exists():
        return f"{key}: {path}: there is no such file in the working directory {package.folder}"
    if not package.holds(Path(clean).as_posix()):
        return (
            f"{key}: {path} would not reach the cluster: it is empty, or left out by a .gitignore or .rayignore file "
            "or as output of earlier runs; give an absolute path that the cluster's machines can read, or set "
            "RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1 to send what git ignores"
        )
    return None


def _inside(folder: Path, file: str | Path) -> str | None:
    """The file's path relative to the folder, or None."""
    for place, root in ((Path(os.path.abspath(file)), folder), (Path(file).resolve(), folder.resolve())):
        if place.is_relative_to(root):
            return place.relative_to(root).as_posix()
    return None


def _run_folders(job: JobConfig, folder: Path) -> tuple[str, ...]:
    """Where runs are written inside the working directory; a job takes no earlier runs along."""
    written = {"runs"}
    if job.output_folder is None:
        return tuple(written)
    place = Path(os.path.abspath(Path(job.output_dir).expanduser()))
    for candidate in (place, place / job.name):
        if candidate.is_relative_to(folder) and candidate != folder:
            written.add(candidate.relative_to(folder).as_posix())
    return tuple(sorted(written))


def _absolute(path: str) -> bool:
    return path.startswith("~") or os.path.isabs(path)


def _override(key: str, value: str) -> str:
    """`key=value`, with quotes where YAML would read the plain value as something else."""
    plain = False
    with suppress(yaml.YAMLError):
        plain = yaml.safe_load(value) == value
    return f"{key}={value}" if plain else f"{key}={yaml.safe_dump(value, default_style=chr(34), width=10**6).strip()}"


def _commit(folder: Path) -> dict[str, str]:
    """Which commit of a git repository the working directory is, if it is one."""
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(folder)]
        options = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run([*git, "status", "--porcelain", "."], **options).stdout  # type: ignore[call-overload]
        return {"git_commit": commit + ("+changes" if changed else "")}
    return {}
