"""Exit statuses: 0 done, 1 the job failed, 2 the request was wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

import rayloom.config.read
import rayloom.train.driver
from rayloom import __version__
from rayloom.cli import cli, main
from rayloom.errors import JobError, RequestError

DONE = {"status": "finished", "steps": 3, "seconds": 1.5, "model_dir": "out/run/model"}


@pytest.fixture
def run(monkeypatch, capsys):
    """`rayloom train job.yaml` with a job that ends as it is told; returns (exit status, output, error output)."""

    def with_outcome(outcome: Any, *arguments: str) -> tuple[Any, str, str]:
        def run_job(job: Any, **options: Any) -> Any:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(rayloom.train.driver, "run_job", run_job)
        job = SimpleNamespace(stage=SimpleNamespace(type="sft"))
        monkeypatch.setattr(rayloom.config.read, "read_job", lambda path, overrides: job)
        monkeypatch.setattr(sys, "argv", ["rayloom", *(arguments or ("train", "job.yaml"))])
        status: Any = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        output = capsys.readouterr()
        return status, output.out, output.err

    return with_outcome


def test_a_job_that_is_done(run):
    status, output, errors = run(DONE)
    assert (status, errors) == (0, "")
    assert "3 steps" in output
    assert "out/run/model" in output


def test_a_job_that_failed(run):
    status, output, errors = run(JobError("run failed. Out of memory"))
    assert (status, output) == (1, "")
    assert "run failed. Out of memory" in errors
    assert errors.count("\n") == 1


def test_a_job_that_was_stopped_says_how_it_goes_on(run):
    status, output, errors = run(
        {**DONE, "status": "stopped", "model_dir": None}, "train", "job.yaml", "train.epochs=2"
    )
    assert (status, output) == (1, "")
    assert "rayloom train job.yaml train.epochs=2 resume=true" in errors


def test_a_request_that_is_wrong(run):
    assert run(RequestError("first", "second")) == (2, "", "error: first\nerror: second\n")


def test_an_interrupt(run):
    status, _, errors = run(KeyboardInterrupt())
    assert (status, errors.strip()) == (1, "stopped")


def test_a_fault_of_the_program_is_not_hidden(run):
    """It is neither of the two: a traceback is what helps."""
    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError())


def test_the_version(run):
    status, output, _ = run(None, "--version")
    assert (status, output) == (0, f"rayloom, version {__version__}\n")


def _help_texts(command: click.Command) -> Iterator[str]:
    yield command.get_help(click.Context(command))
    for below in getattr(command, "commands", {}).values():
        yield from _help_texts(below)


def test_the_files_that_help_and_readme_name_are_there():
    root = Path(__file__).resolve().parents[2]
    named = {path for text in _help_texts(cli) for path in re.findall(r"\b(?:jobs|k8s)/[\w./-]+\.(?:yaml|py)", text)}
    assert "jobs/demo.yaml" in named
    named |= set(re.findall(r"\b(?:jobs|k8s)/[\w./-]+\.(?:yaml|py)", (root / "README.md").read_text(encoding="utf-8")))
    assert [path for path in sorted(named) if not (root / path).is_file()] == []
