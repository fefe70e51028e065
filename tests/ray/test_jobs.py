"""Ray Jobs from end to end on a local head: submit, follow, stop, resume, and plain `ray job submit`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import rayloom
from rayloom.cli import main
from rayloom.errors import JobError, RequestError
from rayloom.jobs import keeper
from rayloom.jobs.client import JobsClient, connect, follow_logs, job_logs, job_status, list_jobs, speaking_to, stop_job
from rayloom.jobs.local_head import LocalHead
from rayloom.jobs.retry import run_to_end
from rayloom.jobs.submit import Submission, prepared, submit

pytestmark = pytest.mark.timeout(400)

JOB = """
name: {name}
model: {{path: {model}}}
method: {{type: full}}
data: {{train: [data/squares.jsonl], cutoff: 128}}
train: {{workers: 1, device: cpu, cpus_per_worker: 3, batch_size: 2, max_steps: 5000, logging_steps: 1}}
"""

PIPELINE = """
name: chain
model: {{path: {model}}}
data: {{cutoff: 128}}
train: {{device: cpu, precision: fp32, batch_size: 2, max_steps: 4, logging_steps: 1}}
steps:
  - name: sft
    method: {{rank: 4}}
    data: {{train: [data/squares.jsonl]}}
  - name: dpo
    from: sft
    data: {{train: [{{path: data/pairs.jsonl, ranking: true}}]}}
    stage: {{type: dpo, reference: cached}}
"""


@pytest.fixture(scope="module")
def client(head: LocalHead) -> JobsClient:
    return connect(head.address, environment=head.environment)


@pytest.fixture(scope="module")
def work(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory that holds no Rayloom; the current directory."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "data").mkdir()
    rows = [{"instruction": f"What is {i} times {i}?", "output": f"It is {i * i}."} for i in range(200)]
    (folder / "data" / "squares.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "job.yaml").write_text(JOB.format(name="squares", model=tiny_model))
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def stopped(client: JobsClient, work: Path) -> Submission:
    """A job that was stopped in the middle of its training."""
    submission = submit(client, "job.yaml", ["train.seed=7"])
    for line in follow_logs(client, submission.id):
        if line.startswith("step "):
            break
    assert job_status(client, submission.id).status == "RUNNING"
    assert stop_job(client, submission.id).status == "STOPPED"
    return submission


def _result(submission: Submission) -> dict[str, object]:
    return json.loads((Path(submission.run_dir) / "result.json").read_text())


def test_stop_leaves_a_checkpoint(client: JobsClient, work: Path, stopped: Submission) -> None:
    assert Path(stopped.run_dir) == work / "runs" / "squares"
    assert _result(stopped)["status"] == "stopped"
    steps = _result(stopped)["steps"]
    folders = [path for path in (Path(stopped.run_dir) / "checkpoints").iterdir() if path.is_dir()]
    assert folders, f"no checkpoint after {steps} steps"
    assert "SIGTERM: saving a checkpoint" in job_logs(client, stopped.id)
    assert stop_job(client, stopped.id).status == "STOPPED"  # once more does no harm


def test_list_shows_what_was_submitted(client: JobsClient, stopped: Submission) -> None:
    job = next(job for job in list_jobs(client) if job.id == stopped.id)
    assert (job.name, job.stage, job.status, job.run_dir) == ("squares", "sft", "STOPPED", str(stopped.run_dir))
    assert job.entrypoint.startswith("python -m rayloom train job.yaml train.seed=7 output_dir=")
    assert job.started is not None
    assert job.ended is not None
    assert job.started < job.ended


def test_resumed_job_goes_on_to_its_end(client: JobsClient, stopped: Submission) -> None:
    goal = int(str(_result(stopped)["steps"])) + 10
    resumed = submit(client, "job.yaml", ["train.seed=7", "resume=true", f"train.max_steps={goal}"])
    lines = list(follow_logs(client, resumed.id))
    job = job_status(client, resumed.id)
    assert (job.status, job.exit_code) == ("SUCCEEDED", 0), job.message
    assert lines == job_logs(client, resumed.id).splitlines()
    steps = [int(line.split()[1]) for line in lines if line.startswith("step ")]
    assert steps[0] > goal - 10
    assert steps[-1] == goal
    assert _result(resumed)["status"] == "finished"
    assert (Path(resumed.run_dir) / "model" / "config.json").exists()


def test_job_that_fails_tells_how(client: JobsClient, stopped: Submission) -> None:
    again = submit(client, "job.yaml")
    lines = list(follow_logs(client, again.id))
    job = job_status(client, again.id)
    assert (job.status, job.exit_code) == ("FAILED", 2)
    assert any(line.startswith("error: output_dir: ") and "is kept as it is" in line for line in lines), lines


def test_a_number_is_taken_once(client: JobsClient, stopped: Submission) -> None:
    """What refuses the second of two who submit a run at the same moment."""
    with pytest.raises(JobError, match=f"{stopped.id} already exists"), speaking_to(client):
        client.submit_job(entrypoint="true", submission_id=stopped.id)


@pytest.mark.slow
def test_a_job_whose_driver_is_killed_goes_on_as_another_submission(
    head: LocalHead, client: JobsClient, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["name=retried", "train.max_steps=1500", "train.save_steps=20"]
    run_dir = work / "runs" / "retried"
    lines: dict[str, list[str]] = {}

    def follow(submission: Submission) -> None:
        seen = lines.setdefault(submission.id, [])
        for line in follow_logs(client, submission.id):
            seen.append(line)
            is_saved = (run_dir / "checkpoints" / "checkpoint_manager_snapshot.json").exists()
            if line.startswith("step ") and is_saved and not killed:
                refused(submission)
                killed.extend(_kill_driver(head, "name=retried"))

    def refused(submission: Submission) -> None:
        """A run has one job at a time; the command says so and ends with the status of a wrong request."""
        for name, value in head.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["rayloom", "submit", "job.yaml", *overrides])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert f"{submission.id} is RUNNING already, the same job" in capsys.readouterr().err

    killed: list[int] = []
    said: list[str] = []
    with prepared("job.yaml", overrides) as job:
        ended = run_to_end(client, job, retries=2, follow=follow, say=said.append)
    assert killed
    assert (ended.id, ended.status, ended.attempt) == ("retried-2", "SUCCEEDED", 2), said
    assert len(said) == 1
    assert said[0].startswith("retried-1  FAILED: ")
    assert "this job has begun before: resume=true" in lines["retried-2"]
    first_step = next(int(line.split()[1]) for line in lines["retried-2"] if line.startswith("step "))
    assert first_step > 20
    assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"
    assert [row.id for row in list_jobs(client) if row.run_dir == str(run_dir)] == ["retried-1", "retried-2"]


def _kill_driver(head: LocalHead, word: str) -> list[int]:
    """Process ids of the job's driver, which are no more."""
    assert head._process is not None
    found = []
    for process in psutil.Process(head._process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if word in process.cmdline() and "rayloom" in process.cmdline():
                process.kill()
                found.append(process.pid)
    return found


@pytest.mark.slow
def test_a_pipeline_is_one_job_whose_finished_steps_are_skipped(
    client: JobsClient, work: Path, tiny_model: Path
) -> None:
    pairs = [{"instruction": f"Say {i}.", "output": [f"It is {i}, I say.", "No."]} for i in range(60)]
    (work / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (work / "chain.yaml").write_text(PIPELINE.format(model=tiny_model))
    skipped = []
    for overrides in ([], ["steps.dpo.train.learning_rate=1e-3"]):
        submission = submit(client, "chain.yaml", overrides)
        lines = list(follow_logs(client, submission.id))
        job = job_status(client, submission.id)
        assert (job.status, job.exit_code) == ("SUCCEEDED", 0), "\n".join(lines)
        assert (job.name, submission.run_dir) == ("chain", str(work / "runs" / "chain"))
        result = json.loads((work / "runs" / "chain" / "result.json").read_text())
        assert [(step["name"], step["status"]) for step in result["pipeline"]] == [
            ("sft", "finished"),
            ("dpo", "finished"),
        ]
        assert (Path(result["pipeline"][1]["run_dir"]) / "model" / "adapter_config.json").exists()
        skipped.append([step["skipped"] for step in result["pipeline"]])
    assert skipped == [[False, False], [True, False]]


def test_plain_ray_job_submit(head: LocalHead, client: JobsClient, work: Path, tmp_path: Path) -> None:
    """The entry point runs from a bare copy of the checkout, whose Rayloom need not be installed."""
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    source = Path(__file__).resolve().parents[2]
    shutil.copytree(Path(rayloom.__file__).parent, checkout / "platform" / "rayloom", ignore=lambda *_: ["__pycache__"])
    with (checkout / "platform" / "rayloom" / "__init__.py").open("a") as file:
        file.write('\n__version__ = "0.0.0+copy"\n')
    (checkout / "jobs").mkdir()
    shutil.copy(source / "jobs" / "run.py", checkout / "jobs")
    shutil.copy(work / "job.yaml", checkout / "jobs" / "plain.yaml")
    shutil.copytree(work / "data", checkout / "data")
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", ".", "--"]
    command += ["python", "jobs/run.py", "jobs/plain.yaml", "name=plain", "train.max_steps=6", f"output_dir={out}"]
    done = subprocess.run(
        command,
        cwd=checkout,
        env={**os.environ, **head.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((out / "plain" / "result.json").read_text())
    assert (result["status"], result["steps"], result["versions"]["rayloom"]) == ("finished", 6, "0.0.0+copy")
    job = list_jobs(client)[-1]
    assert (job.name, job.status) == ("", "SUCCEEDED")


def test_unknown_job_names_the_known(client: JobsClient, stopped: Submission) -> None:
    for ask in (job_status, job_logs, follow_logs, stop_job):
        with pytest.raises(RequestError, match=f"no job 'nope' at http.*{stopped.id}"):
            ask(client, "nope")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "refuses the token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_MODE": "disabled"}, "demands a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
    ],
)
def test_token(head: LocalHead, change: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        connect(environment={**head.environment, **change})
    assert len(str(caught.value).splitlines()) == 1


def test_two_heads_side_by_side_and_nothing_left(head: LocalHead) -> None:
    with LocalHead(num_cpus=1) as second:
        assert second._process is not None
        found = keeper.head_processes(second._process.pid, second._mark, set())
        assert len(found) > 5
        other = connect(second.address, environment=second.environment)
        job_id = other.submit_job(entrypoint="sleep 300")
        assert [job.id for job in list_jobs(other)] == [job_id]
        folder, session = second.folder, second._process.pid
    assert not folder.exists()
    assert [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert keeper.head_processes(session, second._mark, set()) == set()
    connect(head.address, environment=head.environment)  # the first one goes on


def test_head_that_does_not_start_says_why() -> None:
    slow = LocalHead(start_seconds=0.1)
    with pytest.raises(JobError, match=r"waited 0.1 s for the Jobs API of the local Ray head at http://127.0.0.1:"):
        slow.__enter__()
    assert not slow.folder.exists()
    wrong = LocalHead(num_cpus=-1)
    with pytest.raises(
        JobError, match=r"ended with exit status \d+ while it started; the end of head.log:\n"
    ) as caught:
        wrong.__enter__()
    assert "-1" in str(caught.value) or "num_cpus" in str(caught.value)
    assert not wrong.folder.exists()
