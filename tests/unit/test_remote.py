"""Run directories at addresses: on a server that speaks the S3 protocol, and through fsspec's local file system."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.train import Checkpoint
from tests.object_storage import BUCKET, storage_server
from tests.unit.test_run_dir import make_job, snapshot

from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job, read_job
from rayloom.data.plan import Position
from rayloom.errors import JobError, RequestError
from rayloom.jobs.attempt import attempt_override
from rayloom.jobs.entrypoint import lasting_arguments
from rayloom.jobs.local_head import STOP_WAIT
from rayloom.jobs.metadata import job_metadata
from rayloom.k8s.placed_job import place as placed
from rayloom.remote import Remote
from rayloom.stages.rules import check_stage
from rayloom.train.checkpoints import SNAPSHOT, CheckpointWriter, checkpoint_name
from rayloom.train.meter import StreamMeter
from rayloom.train.mirror import Mirror
from rayloom.train.ray_session import JOB_CONFIG
from rayloom.train.run_dir import check_run_dir, open_run_dir
from rayloom.train.track import check_trackers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with storage_server(tmp_path_factory.mktemp("server") / "log") as started:
        yield started.endpoint


@pytest.fixture(params=["s3", "file"])
def output(request: pytest.FixtureRequest, tmp_path: Path, server: str) -> str:
    """An `output_dir` of this test alone."""
    return f"s3://{BUCKET}/{tmp_path.name}" if request.param == "s3" else f"file://{tmp_path}/out"


def tree(place: Remote, folder: Path) -> dict[str, bytes]:
    place.download(folder)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def an_earlier_run(job: JobConfig, steps: list[int]) -> Remote:
    """What a run leaves at its address; the last of the steps is not on the list of what is whole."""
    place = Remote.at(job.run_place)
    place.write("job.yaml", dump_job(job).encode())
    place.write("metrics.jsonl", "".join(json.dumps({"step": step}) + "\n" for step in range(1, 99)).encode())
    for step in steps:
        position = StreamMeter(Position(0, 0, 0), [0], [0, 0], epochs_done=0.0)
        folder = Path(os.environ["PYTEST_SCRATCH"]) / str(step)
        folder.mkdir()
        position.save(folder, step)
        (place / f"checkpoints/step-{step:08d}").upload(folder)
    (place / "checkpoints").write(SNAPSHOT, json.dumps(snapshot(steps[:-1])).encode())
    return place


@pytest.fixture(autouse=True)
def _scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_SCRATCH", str(tmp_path_factory.mktemp("scratch")))


# --- a folder at an address -----------------------------------------------------------------------------------------


def test_files_and_folders(output, tmp_path):
    place = Remote.at(output + "/") / "a"
    assert place.address == output + "/a"
    assert place.names() == set()
    assert place.read("x") is None
    place.delete("x")  # what is not there need not be deleted
    (tmp_path / "local/deep").mkdir(parents=True)
    (tmp_path / "local/deep/f.bin").write_bytes(b"\x00" * 100_000)
    (tmp_path / "local/e").write_bytes(b"")
    place.upload(tmp_path / "local")
    place.write("x", b"1")
    place.write("x", b"2")
    assert place.names() == {"deep", "e", "x"}
    assert place.read("x") == b"2"
    place.move_to(Remote.at(f"{output}/b"))
    assert place.names() == set()
    assert tree(Remote.at(f"{output}/b"), tmp_path / "back") == {"deep/f.bin": b"\x00" * 100_000, "e": b"", "x": b"2"}
    Remote.at(f"{output}/b").delete()
    assert Remote.at(f"{output}/b").names() == set()


def test_it_brings_its_keys_to_another_process(server, tmp_path):
    """Which has none of its own; and nobody reads them from what is printed."""
    place = Remote.at(f"s3://{BUCKET}/keys")
    place.write("x", b"found")
    assert "secret" not in repr(place)
    code = (
        "import pickle, sys; p, fs = pickle.load(sys.stdin.buffer); print(p.read('x'), fs.get_file_info(p.path + '/x'))"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((place, place.arrow)),
        capture_output=True,
        env=bare | {"AWS_EC2_METADATA_DISABLED": "true"},
    )
    assert b"b'found'" in done.stdout, done.stderr.decode()
    assert b"type=FileType.File, size=5" in done.stdout
    assert pickle.loads(pickle.dumps(place.arrow)) == place.arrow  # Ray compares them


# --- what is refused before anything starts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output_dir", "message"),
    [
        ("s3://no-such-bucket/runs", r"output_dir: s3://no-such-bucket/runs cannot be written: .*bucket.*nothing was"),
        ("memory://runs", "output_dir: memory://runs: is no address of a storage; say one like s3://BUCKET/FOLDER"),
        ("s3:///runs", "output_dir: s3:///runs: is no address"),
        ("nope://a/b", "output_dir: nope://a/b: cannot be read here: Protocol not known: nope"),
        ("http://127.0.0.1:9/runs", "output_dir: http://127.0.0.1:9/runs cannot be written: "),
        ("file:///proc/rayloom", "output_dir: file:///proc/rayloom cannot be written: "),
    ],
)
def test_storage_that_cannot_be_written(server, tmp_path, output_dir, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        check_run_dir(make_job(tmp_path, output_dir=output_dir))
    import s3fs

    assert s3fs.S3FileSystem().ls("") == [BUCKET]  # no bucket was made in passing


def test_a_server_that_is_not_there(server, tmp_path, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RequestError, match=r"output_dir: s3://b/runs cannot be written: .*127.0.0.1:9"):
        check_run_dir(make_job(tmp_path, output_dir="s3://b/runs"))
    s3fs.S3FileSystem.clear_instance_cache()


def test_what_needs_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    stage = {"type": "dpo", "reference": "cached"}
    with pytest.raises(RequestError, match=r"stage.reference: cached: .* output_dir is an address \(s3://b/r\)"):
        check_stage(make_job(tmp_path, output_dir="s3://b/r", stage=stage))
    with pytest.raises(RequestError, match=r"train.track: mlflow needs MLFLOW_TRACKING_URI"):
        check_trackers(make_job(tmp_path, output_dir="s3://b/r", train={"track": ["mlflow"]}))


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_new_run_and_its_files(output, tmp_path):
    job = make_job(tmp_path, output_dir=output)
    place = Remote.at(job.run_place)
    run = check_run_dir(job)
    assert tree(Remote.at(output), tmp_path / "1") == {}
    run = open_run_dir(job, run)
    said: list[str] = []
    run.follow(said.append)
    assert place.names() == {"job.yaml"}
    run.metrics_file.write_text('{"step": 1}\n')
    (run.path / "tensorboard").mkdir()
    (run.path / "tensorboard/events").write_bytes(b"\x01")
    run.write_result({"status": "finished"})
    run.finish()
    assert place.names() == {"job.yaml", "metrics.jsonl", "result.json", "tensorboard"}
    assert said == []
    folder = run.path
    with pytest.raises(RequestError, match=f"output_dir: {place} holds a finished run and is kept as it is"):
        check_run_dir(job)
    del run
    gc.collect()  # threads of the client to the storage may have left cycles
    assert not folder.exists()


def test_it_goes_on_from_the_newest_that_is_whole(output, tmp_path):
    job = make_job(tmp_path, output_dir=output, train={"max_steps": 20})
    place = an_earlier_run(job, [4, 8, 12])
    with pytest.raises(RequestError, match="holds an unfinished run"):
        check_run_dir(job)
    assert attempt_override(job) == "resume=true"
    resuming = job.model_copy(update={"resume": True})
    run = open_run_dir(resuming, check_run_dir(resuming))
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert StreamMeter.load(checkpoint)[1] == 8
    assert [row["step"] for row in run.metrics()] == list(range(1, 9))
    assert read_job(run.path / "job.yaml") == job
    assert (place / "checkpoints").names() == {"step-00000004", "step-00000008", SNAPSHOT}  # the broken one is gone
    with pytest.raises(RequestError, match=f"resume: method.rank differs from the run's own \\({place}/job.yaml\\)"):
        check_run_dir(make_job(tmp_path, output_dir=output, resume=True, method={"rank": 3}))


def test_nothing_to_resume(output, tmp_path):
    job = make_job(tmp_path, output_dir=output, resume=True)
    with pytest.raises(RequestError, match=f"resume: there is no checkpoint in {job.run_place}/checkpoints"):
        check_run_dir(job)


def test_overwrite_puts_the_old_run_aside(output, tmp_path):
    an_earlier_run(make_job(tmp_path, output_dir=output), [4, 8])
    before = tree(Remote.at(output), tmp_path / "before")
    job = make_job(tmp_path, output_dir=output, overwrite=True)
    run = open_run_dir(job, check_run_dir(job))
    run.follow(print)
    assert Remote.at(job.run_place).names() == {"job.yaml"}
    assert run.metrics() == []
    assert run.latest_checkpoint() is None
    run.undo()
    assert tree(Remote.at(output), tmp_path / "after") == before
    run = open_run_dir(job, check_run_dir(job))
    run.settle()
    run.finish()
    assert list(tree(Remote.at(output), tmp_path / "settled")) == ["run/job.yaml"]


def test_overwrite_deletes_nothing_that_is_no_run(output, tmp_path):
    Remote.at(f"{output}/run").write("thesis.tex", b"years of work")
    with pytest.raises(RequestError, match=f"overwrite: {output}/run is no run directory"):
        check_run_dir(make_job(tmp_path, output_dir=output, overwrite=True))


def test_a_copy_that_fails_is_tried_again_and_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr("rayloom.train.mirror._SECONDS", 0.01)
    (tmp_path / "out").mkdir()
    mirror = Mirror(Remote.at(f"file://{tmp_path}/out/run"))
    said: list[str] = []
    mirror.start(said.append)
    (tmp_path / "out/run").write_text("in the way")
    (mirror.folder / "metrics.jsonl").write_text("1\n")
    while not said:
        pass
    assert said[0].startswith(f"file://{tmp_path}/out/run cannot be written: ")
    with pytest.raises(JobError, match=f"What could not be written there is kept in {mirror.folder}"):
        mirror.finish()
    assert len(said) == 1
    (tmp_path / "out/run").unlink()
    mirror.finish()
    assert (tmp_path / "out/run/metrics.jsonl").read_text() == "1\n"
    folder = mirror.folder
    del mirror
    assert (folder / "metrics.jsonl").exists()  # it was named to the user


def test_checkpoints_as_ray_train_keeps_them(output, tmp_path):
    """Written by two workers, listed and deleted by the controller, read back by a worker."""
    from ray.train import CheckpointConfig
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
    from ray.train.v2._internal.execution.storage import StorageContext
    from ray.train.v2._internal.execution.training_report import _TrainingReport

    place = Remote.at(f"{output}/run")
    context = StorageContext(place.path, "checkpoints", storage_filesystem=place.arrow)
    manager = CheckpointManager(CheckpointConfig(num_to_keep=1), context)
    writer = CheckpointWriter(place / "checkpoints", pytest.fail)
    for step in (4, 8):
        for rank in ("0", "1"):
            folder = tmp_path / f"{step}-{rank}"
            (folder / "deep").mkdir(parents=True)
            (folder / "deep" / rank).write_text(f"{step} {rank}")
            stored = writer._upload(Checkpoint.from_directory(folder), checkpoint_name(step))
        report = _TrainingReport(metrics={"step": step}, checkpoint=stored, validation=False)

        async def register(report: Any = report) -> None:  # the controller is asynchronous
            manager.register_checkpoint(report)

        asyncio.run(register())
    assert (place / "checkpoints").names() >= {"step-00000008", SNAPSHOT}
    assert "step-00000004" not in (place / "checkpoints").names()
    read = CheckpointManager(CheckpointConfig(num_to_keep=1), context).latest_checkpoint_result
    with read.checkpoint.as_directory() as folder:
        found = {file.name: file.read_text() for file in Path(folder).rglob("*") if file.is_file()}
    assert found == {"0": "8 0", "1": "8 1"}
    local = writer.read(8, tmp_path / "scratch")
    assert sorted(file.name for file in (local / "deep").iterdir()) == ["0", "1"]


def test_an_upload_that_is_refused(server, tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/weights").write_bytes(b"1")
    told: list[str] = []
    writer = CheckpointWriter(Remote.at("s3://gone/runs/run/checkpoints"), told.append)
    with pytest.raises(OSError, match="gone"):
        writer._upload(Checkpoint.from_directory(tmp_path / "local"), checkpoint_name(8))
    (text,) = told
    assert text.startswith(
        "the checkpoint step-00000008 is not complete: s3://gone/runs/run/checkpoints/step-00000008 "
    )
    assert "bucket" in text


# --- elsewhere ------------------------------------------------------------------------------------------------------


def test_an_address_is_no_path(tmp_path):
    job = make_job(tmp_path, output_dir="s3://b/runs/")
    assert job.run_place == "s3://b/runs/run"
    assert job_metadata(job)["run_dir"] == "s3://b/runs/run"
    on_pods: Any = placed(job, root="/app", storage="/storage", gpus=False)
    assert on_pods.output_dir == "s3://b/runs/"
    file = tmp_path / "job.yaml"
    file.write_text(dump_job(job), encoding="utf-8")
    environment = {JOB_CONFIG: json.dumps({"runtime_env": {"working_dir": "gcs://x.zip"}}), **STOP_WAIT}
    assert lasting_arguments([str(file)], environment) == ([str(file)], [])
