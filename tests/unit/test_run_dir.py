"""The run directory: nothing that a run made is lost by mistake, and a refused job leaves no trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray

from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job, read_job
from rayloom.data.plan import Position
from rayloom.errors import RequestError
from rayloom.train.meter import StreamMeter
from rayloom.train.run_dir import CHECKPOINTS, RunDir, check_run_dir, open_run_dir, rest_of


def make_job(folder: Path, **fields: Any) -> JobConfig:
    values = {"name": "run", "output_dir": str(folder / "out"), "model": {"path": "m"}, "data": {"train": ["x.jsonl"]}}
    return JobConfig.model_validate({**values, **fields})


def an_earlier_run(job: JobConfig, status: str | None = None, steps: int = 0, epoch: int = 0) -> Path:
    """What a run of `job` leaves: with a result, or a checkpoint after `steps` steps as Ray Train registers it."""
    run = open_run_dir(job, check_run_dir(job))
    if status:
        run.write_result({"status": status})
    if steps:
        folder = run.path / CHECKPOINTS / f"step-{steps:08d}"
        folder.mkdir(parents=True)
        StreamMeter(Position(epoch, 0, 0), [0], [0, 0], epochs_done=float(epoch)).save(folder, steps)
        register([steps], run.path)
        run.metrics_file.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, steps + 5)))
    return run.path


def register(steps: list[int], run: Path) -> None:
    (run / CHECKPOINTS / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot(steps)))


def snapshot(steps: list[int]) -> dict[str, Any]:
    """Ray Train's list of these checkpoints."""
    results = [{"checkpoint_dir_name": f"step-{step:08d}", "metrics": {"step": step}} for step in steps]
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refusal(job: JobConfig, folder: Path) -> list[str]:
    """The messages of a refusal that leaves everything as it was."""
    before = tree(folder)
    with pytest.raises(RequestError) as refused:
        check_run_dir(job)
    assert tree(folder) == before
    return list(refused.value.messages)


# --- a new run ------------------------------------------------------------------------------------------------------


def test_a_new_run_is_checked_without_a_trace_and_then_opened(tmp_path):
    job = make_job(tmp_path, train={"epochs": 3})
    run = check_run_dir(job)
    assert run == RunDir(tmp_path / "out/run", existed=False)
    assert tree(tmp_path) == {}
    opened = open_run_dir(job, run)
    assert read_job(opened.path / "job.yaml") == job
    assert opened.result() == {}
    assert opened.metrics() == []


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    job = make_job(tmp_path)
    job.run_dir.mkdir(parents=True)
    assert check_run_dir(job).existed


def test_the_stored_job_repeats_the_run_and_not_the_wish(tmp_path):
    job = make_job(tmp_path)
    an_earlier_run(job)
    overwriting = make_job(tmp_path, overwrite=True)
    stored = read_job(open_run_dir(overwriting, check_run_dir(overwriting)).path / "job.yaml")
    assert stored == job


def test_undo_removes_what_opening_made(tmp_path):
    job = make_job(tmp_path, output_dir=str(tmp_path / "a/b"))
    open_run_dir(job, check_run_dir(job)).undo()
    assert tree(tmp_path) == {}


def test_undo_keeps_what_was_there_before_and_what_others_made(tmp_path):
    (tmp_path / "a").mkdir()
    job = make_job(tmp_path, output_dir=str(tmp_path / "a/b/c"))
    opened = open_run_dir(job, check_run_dir(job))
    (tmp_path / "a/b/other").mkdir()
    opened.undo()
    assert list(tree(tmp_path)) == ["a", "a/b", "a/b/other"]
    existing = make_job(tmp_path)
    existing.run_dir.mkdir(parents=True)
    open_run_dir(existing, check_run_dir(existing)).undo()
    assert (existing.run_dir / "job.yaml").exists()


# --- protection -----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_kept(tmp_path):
    job = make_job(tmp_path)
    path = an_earlier_run(job, "finished")
    assert refusal(job, tmp_path) == [
        f"output_dir: {path} holds a finished run and is kept as it is; "
        "choose another name, or overwrite=true deletes it"
    ]


@pytest.mark.parametrize("status", ["stopped", "failed", None])
def test_an_unfinished_run_is_kept(tmp_path, status):
    job = make_job(tmp_path)
    path = an_earlier_run(job, status)
    assert refusal(job, tmp_path) == [
        f"output_dir: {path} holds an unfinished run and is kept as it is; "
        "choose another name, or resume=true goes on, overwrite=true deletes it"
    ]


def test_overwrite_puts_the_old_run_aside_until_the_new_one_trains(tmp_path):
    job = make_job(tmp_path, overwrite=True)
    path = an_earlier_run(make_job(tmp_path), "finished")
    (path / "model").mkdir()
    run = check_run_dir(job)
    assert (path / "model").exists()  # the check touches nothing
    opened = open_run_dir(job, run)
    assert list(tree(path)) == ["job.yaml"]
    opened.undo()
    assert (path / "model").exists()  # refused late: as it was
    assert [child.name for child in path.parent.iterdir()] == [path.name]

    opened = open_run_dir(job, check_run_dir(job))
    opened.settle()
    assert list(tree(path)) == ["job.yaml"]
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_a_result_that_was_cut_off_is_an_unfinished_run(tmp_path):
    path = an_earlier_run(make_job(tmp_path), "finished")
    (path / "result.json").write_text('{"status": "fini')
    assert "holds an unfinished run" in refusal(make_job(tmp_path), tmp_path)[0]


def test_a_list_of_checkpoints_that_ray_cannot_read(tmp_path):
    path = an_earlier_run(make_job(tmp_path), steps=3)
    snapshot = path / CHECKPOINTS / "checkpoint_manager_snapshot.json"
    snapshot.write_text("{")
    (message,) = refusal(make_job(tmp_path, resume=True), tmp_path)
    assert message.startswith(f"resume: Ray {ray.__version__} cannot read {snapshot}: ")


def test_overwrite_deletes_nothing_that_is_no_run(tmp_path):
    job = make_job(tmp_path, overwrite=True)
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "thesis.tex").write_text("years of work")
    assert refusal(job, tmp_path) == [
        f"overwrite: {job.run_dir} is no run directory (it has no job.yaml) and will not be deleted"
    ]


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    job = make_job(tmp_path, resume=True, overwrite=True)
    assert refusal(job, tmp_path) == [
        "resume and overwrite exclude each other: one keeps what is there, the other deletes it"
    ]


# --- where nothing can be written (the tests may run as root, whom no permission stops) -----------------------------


def test_a_file_in_place_of_the_run_directory(tmp_path):
    job = make_job(tmp_path)
    (tmp_path / "out").mkdir()
    job.run_dir.write_text("")
    assert refusal(job, tmp_path) == [f"output_dir: {job.run_dir} is a file; choose another name or output_dir"]


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_place_of_a_folder_above(tmp_path, below):
    (tmp_path / "out").write_text("")
    job = make_job(tmp_path, output_dir=f"{tmp_path}/out{below}")
    assert refusal(job, tmp_path) == [f"output_dir: {tmp_path}/out{below}: {tmp_path}/out is a file, not a folder"]


def test_a_file_system_that_takes_no_files(tmp_path):
    (message,) = refusal(make_job(tmp_path, output_dir="/proc/rayloom"), tmp_path)
    assert message.startswith("output_dir: /proc/rayloom: cannot write in /proc: ")


# --- resume ---------------------------------------------------------------------------------------------------------


def test_a_run_resumes_from_its_latest_checkpoint(tmp_path):
    job = make_job(tmp_path, train={"max_steps": 20})
    path = an_earlier_run(job, "stopped", steps=8)
    resuming = job.model_copy(update={"resume": True})
    run = open_run_dir(resuming, check_run_dir(resuming))
    assert run.latest_checkpoint() == path / CHECKPOINTS / "step-00000008"
    assert [row["step"] for row in run.metrics()] == list(range(1, 9))  # steps behind it will be made again
    assert read_job(path / "job.yaml") == job
    run.undo()
    assert path.exists()


def test_the_newest_registered_checkpoint_counts(tmp_path):
    path = an_earlier_run(make_job(tmp_path), steps=8)
    run = RunDir(path, existed=True)
    newer = path / CHECKPOINTS / "step-00000016"
    newer.mkdir()
    assert run.latest_checkpoint() == path / CHECKPOINTS / "step-00000008"  # half-written: Ray does not know it
    StreamMeter.start(1).save(newer, 16)
    register([8, 16], path)
    assert run.latest_checkpoint() == newer
    (newer / "stream.json").unlink()
    assert run.latest_checkpoint() is None


def test_nothing_to_resume(tmp_path):
    job = make_job(tmp_path, resume=True)
    message = f"resume: there is no checkpoint in {job.run_dir / CHECKPOINTS}; start without resume=true"
    assert refusal(job, tmp_path) == [message]
    an_earlier_run(make_job(tmp_path), "failed")
    assert refusal(job, tmp_path) == [message]


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({"model": {"path": "other"}}, ["model.path differs"]),
        ({"method": {"rank": 3}}, ["method.rank differs"]),
        (
            {"data": {"train": ["x.jsonl"], "cutoff": 99, "packing": False}, "method": {"type": "full"}},
            ["method differs", "data.cutoff, data.packing differ"],
        ),
        ({"data": {"train": ["x.jsonl", "y.jsonl"]}}, ["data.train differs"]),
        ({"train": {"seed": 1}}, ["train.seed is 1, but the run was made with 42; it must stay as it was"]),
        ({"optimizer": {"type": "lion_32bit"}}, ["optimizer"]),
        ({"train": {"precision": "fp32"}}, ["train.precision is fp32, but the run was made with auto"]),
        ({"train": {"deepspeed": "zero2"}}, ["train.deepspeed is zero2, but the run was made with none"]),
        ({"train": {"batch_size": 8}}, ["train.batch_size is 8, but the run was made with 4"]),
        ({"train": {"gradient_accumulation": 2}}, ["train.gradient_accumulation is 2, but the run was made with 1"]),
    ],
)
def test_what_must_stay_as_it_was(tmp_path, change, faults):
    an_earlier_run(make_job(tmp_path), "stopped", steps=8)
    messages = refusal(make_job(tmp_path, resume=True, **change), tmp_path)
    assert len(messages) == len(faults)
    assert all(message.startswith(f"resume: {fault}") for message, fault in zip(messages, faults, strict=True))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"rollout": {"max_staleness": 1}}, "rollout.max_staleness differs"),
        ({"rollout": {"temperature": 0.5, "engines": 2}}, "rollout.temperature differs"),
        ({"rewards": {"sources": [{"type": "http", "url": "http://a/", "weight": 2.0}]}}, "rewards.sources differs"),
        ({"rewards": {"sources": [{"type": "http", "url": "http://b:1/", "timeout": 9, "retries": 9}]}}, None),
        ({"rollout": {"engines": 2, "generate_timeout": 9}}, None),
    ],
)
def test_what_answers_and_rewards_depend_on_must_stay(tmp_path, change, fault):
    ppo = {"stage": {"type": "ppo"}, "rewards": {"sources": [{"type": "http", "url": "http://a/"}]}}
    an_earlier_run(make_job(tmp_path, **ppo), "stopped", steps=8)
    resuming = make_job(tmp_path, resume=True, **{**ppo, **change})
    if fault is None:
        check_run_dir(resuming)
    else:
        (message,) = refusal(resuming, tmp_path)
        assert message.startswith(f"resume: {fault}")


@pytest.mark.parametrize(
    "change", [{"workers": 5}, {"epochs": 9}, {"learning_rate": 1.0}, {"logging_steps": 1}, {"device": "cpu"}]
)
def test_what_may_change(tmp_path, change):
    an_earlier_run(make_job(tmp_path), "stopped", steps=8)
    check_run_dir(make_job(tmp_path, resume=True, train=change))


def test_a_global_batch_may_be_divided_otherwise(tmp_path):
    an_earlier_run(make_job(tmp_path, train={"global_batch_size": 8, "batch_size": 2}), "stopped", steps=8)
    check_run_dir(make_job(tmp_path, resume=True, train={"global_batch_size": 8, "batch_size": 1, "workers": 4}))
    (message,) = refusal(make_job(tmp_path, resume=True, train={"global_batch_size": 4, "batch_size": 2}), tmp_path)
    assert message.startswith("resume: train.global_batch_size is 4, but the run was made with 8")
    messages = refusal(make_job(tmp_path, resume=True, train={"batch_size": 2}), tmp_path)
    assert [message.partition(",")[0] for message in messages] == ["resume: train.gradient_accumulation is 1"]


@pytest.mark.parametrize("deepspeed", ["none", "zero1", "zero2", "zero3"])
def test_another_number_of_workers_may_go_on(tmp_path, deepspeed):
    an_earlier_run(make_job(tmp_path, train={"deepspeed": deepspeed, "workers": 2}), "stopped", steps=8)
    check_run_dir(make_job(tmp_path, resume=True, train={"deepspeed": deepspeed, "workers": 4}))


@pytest.mark.parametrize("goal", [{"max_steps": 8}, {"max_steps": 5}, {"epochs": 2}, {"epochs": 1}])
def test_a_run_with_nothing_left_to_do(tmp_path, goal):
    path = an_earlier_run(make_job(tmp_path), "finished", steps=8, epoch=2)
    assert refusal(make_job(tmp_path, resume=True, train=goal), tmp_path) == [
        f"resume: the run in {path} is finished (step 8), nothing is left to do; "
        "raise train.epochs or train.max_steps to go on"
    ]
    for more in ({"max_steps": 9}, {"epochs": 3}):
        check_run_dir(make_job(tmp_path, resume=True, train=more))


@pytest.mark.parametrize("goal", [{"max_steps": 8}, {"epochs": 2}])
def test_a_run_that_was_killed_before_its_result(tmp_path, goal):
    """All steps are made; the model has still to be saved."""
    an_earlier_run(make_job(tmp_path, train=goal), steps=8, epoch=2)
    check_run_dir(make_job(tmp_path, resume=True, train=goal))
    rest = rest_of(make_job(tmp_path, train=goal))
    assert rest is not None
    assert (rest.resume, rest.overwrite) == (True, False)


def test_the_rest_of_a_job(tmp_path):
    job = make_job(tmp_path)
    rest = rest_of(job)
    assert (rest.resume, rest.overwrite) == (False, False)
    path = an_earlier_run(job, "stopped", steps=8)
    assert (rest_of(job).resume, rest_of(job).overwrite) == (True, False)
    shutil.rmtree(path / "checkpoints")
    assert (rest_of(job).resume, rest_of(job).overwrite) == (False, True)
    (path / "result.json").write_text('{"status": "finished"}')
    assert rest_of(job) is None


def test_what_is_left_of_a_trial(tmp_path):
    from rayloom.search.trial import what_is_left  # loads Ray Tune

    job, other = make_job(tmp_path), make_job(tmp_path, train={"learning_rate": 0.5})
    assert what_is_left(job) == job
    path = an_earlier_run(job, "stopped", steps=8)
    assert (what_is_left(job).resume, what_is_left(job).overwrite) == (True, False)
    assert (what_is_left(other).resume, what_is_left(other).overwrite) == (False, True), "a trial that was named alike"
    (path / "result.json").write_text('{"status": "finished"}')
    assert what_is_left(job) is None
    assert (what_is_left(other).resume, what_is_left(other).overwrite) == (False, True), (
        "nor is it what this one has finished"
    )


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_result_is_replaced_whole(tmp_path):
    run = RunDir(tmp_path, existed=True)
    run.write_result({"status": "failed", "text": "é"})
    run.write_result({"status": "finished"})
    assert run.result() == {"status": "finished"}
    assert list(tree(tmp_path)) == ["result.json"]


def test_the_job_file_is_utf_8(tmp_path):
    job = make_job(tmp_path, model={"path": "Modèle-日本"})
    path = open_run_dir(job, check_run_dir(job)).path / "job.yaml"
    assert path.read_bytes().decode("utf-8") == dump_job(job)
    assert "Modèle-日本" in path.read_text(encoding="utf-8")
