"""Checkpoints on their way from the workers to the job's storage, and what guards those that are there already.

A checkpoint counts once Ray Train's controller has put it on its list, the snapshot: a save that breaks off leaves a
folder that nothing points to. On a disk the list itself is not written atomically, so the one before it is kept beside
it; object storage has a file when all of it is there, and not before.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayloom.errors import JobError
from rayloom.remote import Remote

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that are whole."""
_BEFORE = "checkpoint_manager_snapshot.before.json"


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; None where the name is no checkpoint's."""
    prefix, _, number = name.partition("-")
    return int(number) if prefix == "step" and number.isdecimal() else None


class CheckpointWriter:
    """One worker's way to the storage. Uploads run while the training goes on, in the order in which they were given.

    Args:
        folder: the checkpoints' folder, on storage that all nodes share or reach.
        tell: called with what to say where an upload fails; the job ends then, and keeps the checkpoint before.
    """

    def __init__(self, folder: Path | Remote, tell: Any) -> None:
        self.folder = folder
        self._tell = tell

    def write(self, local: Path, step: int, *, score: float | None, is_first_rank: bool) -> None:
        """Hand a worker's files of a checkpoint over; they are deleted once they have been copied. Every worker calls
        it, also with an empty folder.

        Args:
            score: the larger the better; None: not evaluated.
        """
        import ray.train
        from ray.train import CheckpointUploadMode

        if is_first_rank and isinstance(self.folder, Path):
            keep_snapshot(self.folder)
        metrics = {"step": step} | ({} if score is None else {"score": score})
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(local),
            checkpoint_dir_name=checkpoint_name(step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._upload,
            delete_local_checkpoint_after_upload=True,
        )

    def wait(self) -> None:
        """Return when what was handed over is in the storage and on the list. Every worker calls it."""
        import ray.train

        ray.train.report({})  # takes its turn behind the uploads

    def read(self, step: int, scratch: Path) -> Path:
        """A local folder with the checkpoint of a step that is on the list.

        Args:
            scratch: where to put one that is at an address.
        """
        place = self.folder / checkpoint_name(step)
        if not isinstance(place, Remote):
            return place
        try:
            return place.download(scratch / checkpoint_name(step))
        except OSError as error:
            raise JobError(str(error)) from error

    def _upload(self, checkpoint: Any, name: str) -> Any:
        import pyarrow.fs
        import ray.train

        target = self.folder / name
        if isinstance(target, Remote):
            return self._upload_to(target, Path(checkpoint.path), name)
        try:
            target.mkdir(parents=True, exist_ok=True)
            pyarrow.fs.copy_files(
                checkpoint.path, str(target), checkpoint.filesystem, pyarrow.fs.LocalFileSystem(), use_threads=False
            )
        except OSError as error:
            with suppress(OSError):
                pyarrow.fs.LocalFileSystem().delete_dir(str(target))
            self._tell(f"the checkpoint {name} cannot be written to {self.folder}: {error.strerror or error}")
            raise
        return ray.train.Checkpoint.from_directory(target)

    def _upload_to(self, target: Remote, local: Path, name: str) -> Any:
        import ray.train

        try:
            target.upload(local)
        except OSError as error:
            with suppress(OSError):
                target.delete()
            self._tell(f"the checkpoint {name} is not complete: {error}")
            raise
        return ray.train.Checkpoint(target.path, filesystem=target.arrow)


def keep_snapshot(folder: Path) -> None:
    """Put the list aside, if it is whole, before it is written anew."""
    text = _whole(folder / SNAPSHOT)
    if text is not None:
        partial = folder / f"{_BEFORE}.partial"
        with suppress(OSError):  # a full disk will be told where it matters
            partial.write_text(text)
            partial.replace(folder / _BEFORE)


def mend_snapshot(folder: Path) -> None:
    """Put the list of before in the place of one that is not whole. Its checkpoints are all still there: Ray Train
    deletes one only after it has written a list without it."""
    before = _whole(folder / _BEFORE)
    if (folder / SNAPSHOT).exists() and _whole(folder / SNAPSHOT) is None and before is not None:
        partial = folder / f"{SNAPSHOT}.partial"
        partial.write_text(before)
        partial.replace(folder / SNAPSHOT)


def _whole(file: Path) -> str | None:
    try:
        text = file.read_text()
        json.loads(text)
    except (OSError, ValueError):
        return None
    return text
