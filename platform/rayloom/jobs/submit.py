"""`rayloom submit`: the same job as `rayloom train`, run by Ray Jobs from a copy of the working directory."""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

import rayloom
from rayloom.config.job import JobConfig
from rayloom.config.read import read_job
from rayloom.errors import RequestError
from rayloom.jobs.client import JobsClient, speaking_to
from rayloom.jobs.local_head import STOP_WAIT
from rayloom.jobs.metadata import job_metadata
from rayloom.jobs.package import Package, collect_package


@dataclass(frozen=True)
class Submission:
    """What was submitted."""

    id: str
    """Submission id: the job's name, the time, and four random digits."""
    run_dir: str
    """The run directory, as the cluster's machines see it, or its address."""
    package_bytes: int
    """Size of the copy of the working directory."""
    notes: tuple[str, ...]
    """What the user should know: what is not as it would be with `rayloom train`."""


def submit(
    client: JobsClient, job_file: str | Path, overrides: Sequence[str] = (), *, working_dir: str | Path | None = None
) -> Submission:
    """Check a job here, send its files to the cluster and start it there.

    Args:
        job_file: inside the working directory, like everything that the job names by a relative path.
        working_dir: what the job finds as its current directory; by default the current directory.

    Raises:
        RequestError: the job is wrong, or needs a file that the cluster would not get; nothing was submitted.
        JobError: the cluster did not take the job.
    """
    job = read_job(job_file, overrides)
    folder = Path(os.path.abspath(working_dir or "."))
    if not folder.is_dir():
        raise RequestError(f"working directory: {folder} is no folder")
    package = collect_package(folder, leave_out=_run_folders(job, folder))
    faults, arguments = [], list(overrides)
    file = _inside(folder, job_file)
    if fault := _missing("job file", file or str(job_file), package):
        faults.append(fault)
    for key, path in _relative_paths(job, folder):
        if fault := _missing(key, path, package):
            faults.append(fault)
    if faults or file is None:
        raise RequestError(*faults)

    notes = []
    if job.output_folder is not None and not _absolute(job.output_dir):
        # The job's current directory is a copy that vanishes with it.
        output_dir = Path(os.path.abspath(job.output_dir))
        arguments.append(_override("output_dir", str(output_dir)))
        job = job.model_copy(update={"output_dir": str(output_dir)})
        notes.append(f"output_dir is {output_dir} on the cluster: a place that its machines must share with this one")
    entrypoint = shlex.join(["python", "-m", "rayloom", "train", file, *arguments])
    job_id = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with tempfile.TemporaryDirectory(prefix="rayloom-") as scratch, speaking_to(client):
        archive = Path(scratch) / "working_dir.zip"
        package.write(archive)
        client.submit_job(
            entrypoint=entrypoint,
            submission_id=job_id,
            runtime_env={
                "working_dir": str(archive),
                "py_modules": [str(Path(rayloom.__file__).parent)],
                "excludes": ["__pycache__"],  # of the package; the archive has been sifted
                "env_vars": {"PYTHONUNBUFFERED": "1", **STOP_WAIT},
            },
            metadata=_metadata(job, folder),
        )
    return Submission(job_id, job.run_place, package.size, tuple(notes))


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


def _metadata(job: JobConfig, folder: Path) -> dict[str, str]:
    metadata = job_metadata(job)
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(folder)]
        options = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run([*git, "status", "--porcelain", "."], **options).stdout  # type: ignore[call-overload]
        metadata["git_commit"] = commit + ("+changes" if changed else "")
    return metadata
