"""What `jobs/run.py` makes of its arguments inside and outside of a Ray job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayloom.jobs.entrypoint import lasting_arguments

IN_JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}})}
PATIENT = {"RAY_JOB_STOP_WAIT_TIME_S": "600"}


@pytest.fixture
def job_file(tmp_path: Path) -> str:
    file = tmp_path / "job.yaml"
    file.write_text("{name: a, model: {path: b}, data: {train: [c.jsonl]}}")
    return str(file)


def test_outside_of_a_ray_job_nothing_changes(job_file: str) -> None:
    assert lasting_arguments([job_file, "train.epochs=2"], {}) == ([job_file, "train.epochs=2"], [])


def test_relative_output_dir_goes_home(job_file: str) -> None:
    arguments, notes = lasting_arguments(["-v", job_file], IN_JOB | PATIENT)
    assert arguments == ["-v", job_file, "output_dir=~/rayloom/runs"]
    assert len(notes) == 1
    assert str(Path.home() / "rayloom" / "runs") in notes[0]


@pytest.mark.parametrize("place", ["/shared/runs", "~/runs"])
def test_lasting_output_dir_is_left_alone(job_file: str, place: str) -> None:
    arguments = [job_file, f"output_dir={place}"]
    assert lasting_arguments(arguments, IN_JOB | PATIENT) == (arguments, [])


def test_job_without_a_copied_directory_keeps_its_own(job_file: str) -> None:
    environment = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {}})} | PATIENT
    assert lasting_arguments([job_file], environment) == ([job_file], [])


def test_says_that_a_stop_would_kill(job_file: str) -> None:
    _, notes = lasting_arguments([job_file, "output_dir=/shared"], IN_JOB)
    assert "RAY_JOB_STOP_WAIT_TIME_S" in notes[0]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["missing.yaml"]])
def test_wrong_arguments_are_left_to_the_command(arguments: list[str]) -> None:
    assert lasting_arguments(arguments, IN_JOB | PATIENT) == (arguments, [])


def test_a_pipeline_goes_home_too(tmp_path: Path) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text("{name: a, model: {path: b}, steps: [{name: c, data: {train: [d.jsonl]}}]}")
    arguments, _ = lasting_arguments([str(file), "steps[0].train.epochs=2"], IN_JOB | PATIENT)
    assert arguments == [str(file), "steps[0].train.epochs=2", "output_dir=~/rayloom/runs"]
