"""What a submission takes along, what it refuses, and what it starts."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import ray._private.runtime_env.packaging as ray_packaging

from rayloom.errors import RequestError
from rayloom.jobs.package import collect_package
from rayloom.jobs.submit import submit

JOB = """
name: first
model: {path: pypi:some-model}
data: {train: [data/rows.jsonl]}
"""


class _Client:
    """Keeps what it is given to submit."""

    def __init__(self) -> None:
        self.submitted: dict[str, Any] | None = None
        self.files: list[str] = []

    def get_address(self) -> str:
        return "http://fake:1"

    def submit_job(self, **job: Any) -> str:
        self.submitted = job
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
    assert submission.id.startswith("first-20")


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
    submit(client, "jobs/first.yaml")
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
