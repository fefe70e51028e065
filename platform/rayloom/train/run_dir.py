"""The run directory: its protection, its files, and what an earlier run left in it."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job
from rayloom.errors import RequestError
from rayloom.remote import Remote
from rayloom.train.checkpoints import SNAPSHOT, mend_snapshot, step_of
from rayloom.train.meter import STREAM_FILE, StreamMeter
from rayloom.train.mirror import Mirror

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class RunDir:
    """`<output_dir>/<name>`. Only the driver writes here, but for Ray Train's checkpoints and the model."""

    path: Path
    """Where the driver writes: the run directory, or a temporary folder whose files `mirror` copies to it."""
    existed: bool
    made: tuple[Path, ...] = ()
    """What opening it made: the directory and the folders above it that were missing, innermost first."""
    replaced: Path | Remote | None = None
    """Where the run that this one replaces is kept until it is sure that this one trains."""
    mirror: Mirror | None = None
    """Of a run directory at an address."""

    @property
    def place(self) -> Path | Remote:
        """The run directory itself."""
        return self.mirror.remote if self.mirror is not None else self.path

    @property
    def model(self) -> Path | Remote:
        return self.place / "model"

    @property
    def checkpoints(self) -> Path | Remote:
        return self.place / CHECKPOINTS

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def manifest_file(self) -> Path:
        """Which rows each step trained on, one object for each step and rank."""
        return self.path / "manifest.jsonl"

    @property
    def data_file(self) -> Path:
        """What the data was when the run began: of each set a fingerprint of its files."""
        return self.path / "data.json"

    def result(self) -> dict[str, Any]:
        """`result.json` of an earlier run; empty when there is none."""
        try:
            return dict(json.loads(self.result_file.read_text()))
        except (OSError, ValueError, TypeError):  # not there, or cut off when the machine went down
            return {}

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`."""
        return read_rows(self.metrics_file)

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint that Ray Train would resume from: the newest that it knows to be whole. Of one at an address,
        a local folder that holds the position in the stream, and no more."""
        from ray.train import Result

        logging.getLogger("ray.train").setLevel(logging.WARNING)  # it tells at length that it has found what we ask for
        folder = self.checkpoints
        try:
            if isinstance(folder, Remote):
                if folder.read(SNAPSHOT) is None:
                    return None
                checkpoint = Result.from_path(folder.path, storage_filesystem=folder.arrow).checkpoint
            else:
                if not (folder / SNAPSHOT).exists():
                    return None
                mend_snapshot(folder)
                checkpoint = Result.from_path(folder).checkpoint
        except Exception as error:  # Ray says anything from JSONDecodeError to its own ValueErrors
            raise RequestError(
                f"resume: Ray {version('ray')} cannot read {folder / SNAPSHOT}: {error}; "
                "start anew with another name, or with overwrite=true"
            ) from None
        if checkpoint is None:
            return None
        found = self._with_position(folder, Path(checkpoint.path))
        return found if (found / STREAM_FILE).exists() else None

    def _with_position(self, folder: Path | Remote, checkpoint: Path) -> Path:
        """A local folder with what a checkpoint says of the stream."""
        if not isinstance(folder, Remote):
            return checkpoint
        local = self.path / ".positions" / checkpoint.name
        local.mkdir(parents=True, exist_ok=True)
        content = (folder / checkpoint.name).read(STREAM_FILE)
        if content is not None:
            (local / STREAM_FILE).write_bytes(content)
        return local

    def write_result(self, result: dict[str, Any]) -> None:
        """Replace `result.json`; never half-written."""
        partial = self.result_file.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.replace(self.result_file)

    def cut_back(self) -> int:
        """Forget what was written after the last checkpoint, which is trained anew; the checkpoint's step, or 0."""
        checkpoint = self.latest_checkpoint()
        step = StreamMeter.load(checkpoint)[1] if checkpoint else 0
        self._clear_behind(step)
        for file in (self.metrics_file, self.manifest_file):
            if file.exists():
                kept = [row for row in read_rows(file) if row["step"] <= step]
                file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return step

    def _clear_behind(self, step: int) -> None:
        """Delete checkpoints that were not written to the end: their files would be among those of a later one."""
        folder = self.checkpoints
        with suppress(OSError):
            names = folder.names() if isinstance(folder, Remote) else {child.name for child in folder.iterdir()}
            for name in names:
                if (step_of(name) or 0) > step:
                    _delete(folder / name)

    def follow(self, say: Callable[[str], None]) -> None:
        """Of a run directory at an address: copy what the driver writes, from now on.

        Raises:
            RequestError: it cannot be written any more.
        """
        if self.mirror is not None:
            try:
                self.mirror.start(say)
            except OSError as error:
                raise RequestError(f"output_dir: {error}") from None

    def finish(self) -> None:
        """Return when everything is in the run directory.

        Raises:
            JobError: its address refuses.
        """
        if self.mirror is not None:
            self.mirror.finish()

    def settle(self) -> None:
        """The new run has begun to train: what it replaces is deleted for good."""
        if self.replaced is not None:
            _delete(self.replaced)

    def undo(self) -> None:
        """Leave no trace, if the directory is of our making; put back what it was to replace."""
        if self.mirror is not None:
            self.mirror.stop()
            if not self.existed:
                with suppress(OSError):
                    self.mirror.remote.delete()
                    if isinstance(self.replaced, Remote):
                        self.replaced.move_to(self.mirror.remote)
        elif not self.existed:
            shutil.rmtree(self.path, ignore_errors=True)
            if isinstance(self.replaced, Path) and self.replaced.exists():
                self.replaced.rename(self.path)
            with suppress(OSError):  # a folder that another job has begun to use stays
                for folder in self.made[1:]:
                    folder.rmdir()


def find_run(job: JobConfig) -> RunDir:
    """The run directory as it is; of one at an address, the driver's files have been fetched.

    Raises:
        RequestError: the address cannot be read.
    """
    if job.output_folder is not None:
        return RunDir(job.run_dir, job.run_dir.exists())
    mirror = Mirror(Remote.at(job.run_place))
    try:
        return RunDir(mirror.folder, mirror.fetch(), mirror=mirror)
    except OSError as error:
        raise RequestError(f"output_dir: {error}") from None


def rest_of(job: JobConfig) -> JobConfig | None:
    """What is left to do of a job whose run directory holds this very job, if anything: all of it, or what comes after
    the last checkpoint. None: it is finished.

    Raises:
        RequestError: the run directory cannot be read.
    """
    run = find_run(job)
    if run.result().get("status") == "finished":
        return None
    goes_on = run.existed and run.latest_checkpoint() is not None
    return job.model_copy(update={"resume": goes_on, "overwrite": run.existed and not goes_on})


def check_run_dir(job: JobConfig) -> RunDir:
    """Refuse what would overwrite a run or resume nothing. Writes nothing that stays.

    Raises:
        RequestError: naming `resume`, `overwrite` or `output_dir` and what would be right.
    """
    if job.resume and job.overwrite:
        raise RequestError("resume and overwrite exclude each other: one keeps what is there, the other deletes it")
    if job.output_folder is not None:
        _check_writable(job, job.run_dir)
    else:
        Remote.at(job.output_dir).check("output_dir")
    run = find_run(job)
    is_used = run.existed and (run.mirror is not None or not run.path.is_dir() or any(run.path.iterdir()))
    if run.existed and not run.path.is_dir():
        raise RequestError(f"output_dir: {run.path} is a file; choose another name or output_dir")
    if job.resume:
        _check_resume(job, run)
    elif is_used and not job.overwrite:
        status = run.result().get("status")
        state = "a finished run" if status == "finished" else "an unfinished run"
        hint = "overwrite=true deletes it" if status == "finished" else "resume=true goes on, overwrite=true deletes it"
        raise RequestError(
            f"output_dir: {run.place} holds {state} and is kept as it is; choose another name, or {hint}"
        )
    elif is_used and not (run.path / "job.yaml").exists():
        raise RequestError(f"overwrite: {run.place} is no run directory (it has no job.yaml) and will not be deleted")
    return run


def open_run_dir(job: JobConfig, run: RunDir) -> RunDir:
    """Make the directory ready: metrics are cut back to the checkpoint under `resume`; under `overwrite` the old run is
    put aside, until `settle` deletes it or `undo` puts it back.

    Raises:
        RequestError: the old run's address refuses that.
    """
    if run.mirror is not None and job.overwrite and run.existed:
        run = _put_aside(run, run.mirror)
    elif job.overwrite and run.existed:
        aside = run.path.with_name(f".{run.path.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        run.path.rename(aside)
        run = RunDir(run.path, existed=False, replaced=aside)
    run = replace(run, made=tuple(folder for folder in (run.path, *run.path.parents) if not folder.exists()))
    run.path.mkdir(parents=True, exist_ok=True)
    if job.resume:
        run.cut_back()
    # Resuming or overwriting is a wish for this start, no property of the job: what is stored repeats the run.
    stored = job.model_copy(update={"resume": False, "overwrite": False})
    (run.path / "job.yaml").write_text(dump_job(stored), encoding="utf-8")
    return run


def _put_aside(run: RunDir, mirror: Mirror) -> RunDir:
    """Of a run at an address; object storage copies each file for it."""
    above, _, name = mirror.remote.address.rpartition("/")
    aside = Remote(f"{above}/.{name}.replaced", mirror.remote.variables)
    try:
        aside.delete()
        mirror.remote.move_to(aside)
    except OSError as error:
        raise RequestError(f"overwrite: {error}") from None
    mirror.forget()
    return replace(run, existed=False, replaced=aside)


def _delete(place: Path | Remote) -> None:
    if isinstance(place, Remote):
        with suppress(OSError):
            place.delete()
    else:
        shutil.rmtree(place, ignore_errors=True)


def check_data(run: RunDir, fingerprints: dict[str, str]) -> None:
    """Refuse to resume on other data: a position counts rows of the files that the run began with.

    Raises:
        RequestError: naming the sets that have changed.
    """
    if not run.existed or not run.data_file.exists():
        return
    before = json.loads(run.data_file.read_text())
    changed = [name for name, fingerprint in fingerprints.items() if before.get(name) != fingerprint]
    if changed:
        raise RequestError(
            f"resume: the data has changed since the run began: {', '.join(changed)}; put the old files back, "
            "or start anew with another name"
        )


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a `.jsonl` file; of one that is not there, none."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def _check_writable(job: JobConfig, path: Path) -> None:
    folder = path
    while not folder.exists():
        folder = folder.parent
    if folder != path and not folder.is_dir():
        raise RequestError(f"output_dir: {job.output_dir}: {folder} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=folder if folder.is_dir() else folder.parent):
            pass
    except OSError as error:
        raise RequestError(
            f"output_dir: {job.output_dir}: cannot write in {folder}: {error.strerror or error}"
        ) from None


def _check_resume(job: JobConfig, run: RunDir) -> None:
    checkpoint = run.latest_checkpoint() if run.existed else None
    if checkpoint is None:
        raise RequestError(f"resume: there is no checkpoint in {run.checkpoints}; start without resume=true")
    from rayloom.config.read import read_job

    before = read_job(run.path / "job.yaml")
    faults = differences(before, job, run.place / "job.yaml")
    keys = {key: key for key in ("seed", "precision", "deepspeed")}
    if before.train.global_batch_size is None or job.train.global_batch_size is None:
        keys |= {"batch_size": "batch_size", "gradient_accumulation": "accumulation"}
    else:  # then a step takes the same rows, however they are divided
        keys |= {"global_batch_size": "global_batch_size"}
    for key, attribute in keys.items():
        old, new = getattr(before.train, attribute), getattr(job.train, attribute)
        if old != new:
            faults.append(f"resume: train.{key} is {new}, but the run was made with {old}; it must stay as it was")
    if faults:
        raise RequestError(*faults)
    meter, step = StreamMeter.load(checkpoint)
    goal = job.train.max_steps
    is_over = meter.epochs_done >= job.train.epochs if goal is None else step >= goal
    # One that was killed between its last checkpoint and its result has its model still to save.
    if is_over and (run.result().get("status") == "finished" or (goal is not None and step > goal)):
        raise RequestError(
            f"resume: the run in {run.place} is finished (step {step}), nothing is left to do; "
            "raise train.epochs or train.max_steps to go on"
        )


_DRAWING = ("precision", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "stop", "max_staleness")
"""Keys of `rollout` on which the answers depend."""
_ASKING = ("timeout", "retries", "batch_size", "url")
"""Keys of `rewards` on which they do not depend."""


def differences(before: JobConfig, job: JobConfig, place: Any) -> list[str]:
    """Of two jobs what a run that goes on could not change, a message for each part. `place`: of the first one."""
    faults = []
    for part in ("model", "method", "data", "stage", "optimizer", "rollout", "rewards"):
        old, new = (_that_counts(getattr(one, part), part) for one in (before, job))
        if changed := _changed_keys(old, new, part):
            differ = f"{', '.join(changed)} {'differs' if len(changed) == 1 else 'differ'}"
            faults.append(f"resume: {differ} from the run's own ({place}); a run goes on as it began")
    return faults


def _that_counts(part: Any, name: str) -> Any:
    if part is None:
        return None
    dumped = part.model_dump()
    if name == "rollout":
        return {key: dumped[key] for key in _DRAWING}
    if name == "rewards":
        sources = [{key: one[key] for key in one if key not in _ASKING} for one in dumped["sources"]]
        return {**dumped, "sources": sources}
    return dumped


def _changed_keys(before: Any, now: Any, key: str) -> list[str]:
    """The keys at and below `key` whose values differ; of a list or a part of another type, itself."""
    if before == now:
        return []
    if not (isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys()):
        return [key]
    return [found for name in now for found in _changed_keys(before[name], now[name], f"{key}.{name}")]
