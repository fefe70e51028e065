"""What a submission takes along, what it refuses, and what it starts."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import ray._private.runtime_env.packaging as ray_packaging
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.job_submission import JobStatus

from rayloom.cli import cli
from rayloom.errors import RequestError
from rayloom.jobs.package import collect_package
from rayloom.jobs.retry import run_to_end
from rayloom.jobs.submit import DriverResources, Submission, prepared, submit

JOB = """
name: first
model: {path: pypi:some-model}
data: {train: [data/rows.jsonl]}
"""


class _Client:
    """Keeps what it is given to submit, and lists it as a job that runs."""

    def __init__(self) -> None:
        self.submitted: dict[str, Any] | None = None
        self.files: list[str] = []
        self.jobs: list[JobDetails] = []
        self.outcomes: list[tuple[JobStatus, int | None]] = []
        """Status and exit status of each submission, the first one first; those that are not told run."""

    def get_address(self) -> str:
        return "http://fake:1"

    def list_jobs(self) -> list[JobDetails]:
        return self.jobs

    def get_job_info(self, job_id: str) -> JobDetails:
        return next(job for job in self.jobs if job.submission_id == job_id)

    def submit_job(self, **job: Any) -> str:
        if any(other.submission_id == job["submission_id"] for other in self.jobs):
            told = f"Traceback (most recent call last):\nValueError: Job with submission_id {job['submission_id']}"
            raise RuntimeError(f"Request failed with status code 400: {told} already exists. Please use another.\n.")
        self.submitted = job
        status, exit_code = self.outcomes.pop(0) if self.outcomes else (JobStatus.RUNNING, None)
        self.jobs.append(
            JobDetails(
                type=JobType.SUBMISSION,
                submission_id=job["submission_id"],
                entrypoint=job["entrypoint"],
                metadata=job["metadata"],
                status=status,
                driver_exit_code=exit_code,
                message="the driver was lost" if exit_code is None else "",
            )
        )
        self.files = ZipFile(job["runtime_env"]["working_dir"]).namelist()
        return str(job["submission_id"])


@pytest.fixture
def client() -> Any:
    return _Client()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a job and its data; the current directory."""
    folder = tmp_path / "work"
    _write(folder, {"jobs/first.yaml": JOB, "data/rows.jsonl": "{}\n", "runs/old/model/weights": "x", ".git/HEAD": "x"})
    monkeypatch.chdir(folder)
    return folder


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _entrypoint(client: Any) -> list[str]:
    return shlex.split(client.submitted["entrypoint"])


def test_runs_rayloom_train_with_the_overrides(client: Any, work: Path) -> None:
    submission = submit(client, "jobs/first.yaml", ["train.epochs=3", "data.train[0].path='data/rows.jsonl'"])
    output_dir = work / "runs"
    command, arguments = _entrypoint(client)[:5], _entrypoint(client)[5:]
    assert command == ["python", "-m", "rayloom", "train", "jobs/first.yaml"]
    assert arguments == ["train.epochs=3", "data.train[0].path='data/rows.jsonl'", f"output_dir={output_dir}"]
    assert submission.run_dir == str(output_dir / "first")
    assert "output_dir" in submission.notes[0]
    assert submission.id == client.submitted["submission_id"]
    assert submission.id == "first-1"


def test_absolute_output_dir_is_left_alone(client: Any, work: Path) -> None:
    submission = submit(client, work / "jobs" / "first.yaml", ["output_dir=/shared/runs"])
    assert _entrypoint(client)[4:] == ["jobs/first.yaml", "output_dir=/shared/runs"]
    assert submission.notes == ()


def test_output_dir_that_yaml_would_misread(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a: b #c"
    _write(folder, {"first.yaml": JOB, "data/rows.jsonl": "{}\n"})
    monkeypatch.chdir(folder)
    submit(client, "first.yaml")
    assert _entrypoint(client)[-1] == f'output_dir="{folder}/runs"'


def test_takes_what_the_job_needs_and_no_runs(client: Any, work: Path) -> None:
    submit(client, "jobs/first.yaml")
    assert client.files == ["data/rows.jsonl", "jobs/first.yaml"]
    environment = client.submitted["runtime_env"]
    assert [Path(path).name for path in environment["py_modules"]] == ["rayloom"]
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300
    assert environment["env_vars"]["PYTHONUNBUFFERED"] == "1"


def test_metadata(client: Any, work: Path) -> None:
    submit(client, "jobs/first.yaml", ["output_dir=/shared"])
    metadata = client.submitted["metadata"]
    assert metadata["job_name"] == "first"
    assert metadata["run_dir"] == "/shared/first"
    assert metadata["stage"] == "sft"
    assert len(metadata["config_hash"]) == 12
    assert "git_commit" not in metadata
    assert all(isinstance(value, str) for value in metadata.values())


def test_metadata_names_the_commit(client: Any, work: Path) -> None:
    (work / ".git" / "HEAD").unlink()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(work)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    submit(client, "jobs/first.yaml")
    assert client.submitted["metadata"]["git_commit"] == head
    (work / "jobs" / "first.yaml").write_text(JOB + "# changed\n")
    submit(client, "jobs/first.yaml", ["output_dir=elsewhere"])
    assert client.submitted["metadata"]["git_commit"] == head + "+changes"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.train[0].path=../rows.jsonl",
            r"data.train\[0\].path: ../rows.jsonl is outside of the working",
        ),
        ("data.train[0].path=data/none.jsonl", "data/none.jsonl: there is no such file in the working directory"),
        ("data.train[0].path=secret/rows.jsonl", "secret/rows.jsonl would not reach the cluster"),
        ("model.path=./model", r"model.path: ./model: there is no such file"),
        ("model.path=runs/old/model", r"model.path: runs/old/model would not reach the cluster"),
        ("data.template=chat.jinja", "data.template: chat.jinja: there is no such file"),
        ("trian.epochs=3", "trian"),
    ],
)
def test_refuses_before_anything_is_sent(client: Any, work: Path, override: str, message: str) -> None:
    _write(work, {".gitignore": "/secret/\n", "secret/rows.jsonl": "{}\n"})
    with pytest.raises(RequestError, match=message):
        submit(client, "jobs/first.yaml", [override])
    assert client.submitted is None


def test_refuses_every_fault_at_once(client: Any, work: Path) -> None:
    with pytest.raises(RequestError) as caught:
        submit(client, "jobs/first.yaml", ["data.train[0].path=none.jsonl", "model.path=./none"])
    assert len(caught.value.messages) == 2


def test_job_file_outside_of_the_working_directory(client: Any, work: Path, tmp_path: Path) -> None:
    _write(tmp_path, {"other.yaml": JOB})
    with pytest.raises(RequestError, match=r"job file: .*other.yaml is outside of the working directory"):
        submit(client, "../other.yaml")
    assert client.submitted is None


def test_another_working_directory(client: Any, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    submission = submit(client, "work/jobs/first.yaml", working_dir="work")
    assert _entrypoint(client)[4:] == ["jobs/first.yaml", f"output_dir={tmp_path / 'runs'}"]
    assert submission.run_dir == str(tmp_path / "runs" / "first")


def test_package_follows_ignore_files_of_every_folder(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {".gitignore": "*.log\n", "a.log": "x", "a/.rayignore": "big\n", "a/big": "x", "a/small": "x", "b/big": "x"}
        | {"results/x": "x", "a/results/x": "x", "a/__pycache__/x.pyc": "x", ".venv/bin/python": "x"},
    )
    package = collect_package(tmp_path, leave_out=("results",))
    assert sorted(package.files) == [".gitignore", "a/.rayignore", "a/results/x", "a/small", "b/big"]
    assert package.holds("a")
    assert package.holds("./a/small")
    assert not package.holds("a/big")
    assert not package.holds("results")


def test_package_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_packaging, "GCS_STORAGE_MAX_SIZE", 2 * 2**20)
    _write(tmp_path, {"data/big/a": "x" * 2**20, "data/big/b": "x" * 2**20, "data/small": "x", "jobs/job.yaml": "x"})
    with pytest.raises(RequestError, match=r"too large for Ray Jobs: 2.0 MiB, .*Largest: data/big \(2.0 MiB\)"):
        collect_package(tmp_path)


def test_same_files_make_the_same_archive(work: Path, tmp_path: Path) -> None:
    for name in ("1.zip", "2.zip"):
        collect_package(work).write(tmp_path / name)
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()


# --- one job of a run at a time --------------------------------------------------------------------------------------


def test_a_run_has_one_job_at_a_time(client: Any, work: Path) -> None:
    first = submit(client, "jobs/first.yaml")
    with pytest.raises(RequestError, match=rf"name: first: {first.id} is RUNNING already, the same job in the run dir"):
        submit(client, "jobs/first.yaml")
    with pytest.raises(RequestError, match=r"RUNNING already, another job .*rayloom jobs stop first-1"):
        submit(client, "jobs/first.yaml", ["train.epochs=7"])
    assert len(client.jobs) == 1
    assert submit(client, "jobs/first.yaml", ["output_dir=elsewhere"]).id == "first-2", "another run of that name"
    client.jobs[0].status = JobStatus.FAILED
    assert submit(client, "jobs/first.yaml").id == "first-3"
    assert submit(client, "jobs/first.yaml", ["name=first-3"]).id == "first-3-1", "a name that looks like an id"


def test_who_submits_at_the_same_moment_is_refused(client: Any, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have looked before either had submitted: Ray takes the number once."""
    other = submit(client, "jobs/first.yaml")
    seen = iter([[], client.jobs])
    monkeypatch.setattr(client, "list_jobs", lambda: next(seen))
    with pytest.raises(RequestError, match=f"{other.id} is RUNNING already"):
        submit(client, "jobs/first.yaml")
    assert len(client.jobs) == 1


def test_what_the_driver_takes(client: Any, work: Path) -> None:
    submit(client, "jobs/first.yaml", driver=DriverResources(cpus=0.5, memory_gib=2, custom={"driver": 1}))
    kept = {key: client.submitted[f"entrypoint_{key}"] for key in ("num_cpus", "memory", "resources")}
    assert kept == {"num_cpus": 0.5, "memory": 2 * 2**30, "resources": {"driver": 1}}


# --- retries ---------------------------------------------------------------------------------------------------------


def _run_to_end(client: Any, retries: int, overrides: list[str]) -> tuple[list[Submission], list[str], Any]:
    shown: list[Submission] = []
    said: list[str] = []
    with prepared("jobs/first.yaml", overrides) as job:
        ended = run_to_end(client, job, retries=retries, follow=shown.append, say=said.append)
    return shown, said, ended


def test_a_job_that_fails_is_submitted_again_and_goes_on(client: Any, work: Path) -> None:
    client.outcomes = [(JobStatus.FAILED, 1), (JobStatus.FAILED, None), (JobStatus.SUCCEEDED, 0)]
    shown, said, ended = _run_to_end(client, 3, ["overwrite=true", "train.epochs=3"])
    assert [submission.id for submission in shown] == ["first-1", "first-2", "first-3"]
    assert (ended.id, ended.status, ended.attempt) == ("first-3", "SUCCEEDED", 3)
    assert said == [
        "first-1  FAILED: exit status 1; submitting it again, retry 1 of 3",
        "first-2  FAILED: the driver was lost; submitting it again, retry 2 of 3",
    ]
    first, *again = [job.entrypoint for job in client.jobs]
    assert first.startswith("python -m rayloom train jobs/first.yaml overwrite=true train.epochs=3 output_dir=")
    for entrypoint in again:
        assert entrypoint.startswith("python -m rayloom.jobs.attempt jobs/first.yaml overwrite=true train.epochs=3")
    assert len({job.metadata["run_dir"] for job in client.jobs}) == 1


@pytest.mark.parametrize(
    ("outcomes", "retries", "submissions"),
    [
        ([(JobStatus.FAILED, 1)] * 2, 1, 2),
        ([(JobStatus.FAILED, 1)], 0, 1),
        ([(JobStatus.FAILED, 2)], 5, 1),  # the request was wrong
        ([(JobStatus.STOPPED, 1)], 5, 1),
        ([(JobStatus.SUCCEEDED, 0)], 5, 1),
    ],
)
def test_how_often_it_is_submitted(client: Any, work: Path, outcomes: Any, retries: int, submissions: int) -> None:
    client.outcomes = list(outcomes)
    shown, said, ended = _run_to_end(client, retries, [])
    assert len(shown) == submissions
    assert len(said) == submissions - 1
    assert ended.status == outcomes[-1][0].value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--retries", "2", "--no-wait"], "--retries needs somebody who waits"),
        (["--driver-resource", "driver"], "--driver-resource driver: write it as NAME=N"),
        (["--driver-resource", "driver=0"], "--driver-resource driver=0: write it as NAME=N"),
    ],
)
def test_refused_options(options: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        cli(["submit", "jobs/first.yaml", *options], standalone_mode=False)


# --- pipelines -------------------------------------------------------------------------------------------------------

PIPELINE = """
name: chain
model: {path: pypi:some-model}
steps:
  - {name: sft, data: {train: [data/rows.jsonl]}}
  - {name: dpo, from: sft, data: {train: [{path: data/pairs.jsonl, ranking: true}]}, stage: {type: dpo}}
"""


def test_a_pipeline_is_submitted_as_a_whole(client: Any, work: Path) -> None:
    _write(work, {"jobs/chain.yaml": PIPELINE, "data/pairs.jsonl": "{}\n"})
    submission = submit(client, "jobs/chain.yaml", ["steps[1].train.epochs=3"])
    assert _entrypoint(client)[3:] == ["train", "jobs/chain.yaml", "steps[1].train.epochs=3", f"output_dir={work}/runs"]
    assert submission.run_dir == str(work / "runs" / "chain")
    metadata = client.submitted["metadata"]
    assert (metadata["job_name"], metadata["stage"]) == ("chain", "sft, dpo")
    assert "data/pairs.jsonl" in client.files


def test_a_pipeline_with_a_file_that_would_not_reach_the_cluster(client: Any, work: Path) -> None:
    _write(work, {"jobs/chain.yaml": PIPELINE})
    with pytest.raises(RequestError, match=r"data.train\[0\].path: data/pairs.jsonl: there is no such file"):
        submit(client, "jobs/chain.yaml")
    with pytest.raises(RequestError, match=r"steps\[1\].from: there is no step"):
        submit(client, "jobs/chain.yaml", ["steps[0].name=other"])
    assert client.submitted is None
