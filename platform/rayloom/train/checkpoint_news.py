"""Tells the driver of each checkpoint that counts. A file of its own: Ray Train's controller loads it, which has what
it needs already."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback

from rayloom.train.pins import Pins


class CheckpointNews(UserCallback):
    """Called in the controller when Ray Train has put a checkpoint on its list, and before it deletes that one; posts
    to the driver's monitor, and pins what the job's host needs."""

    def __init__(self, monitor: Any, pins: Pins | None) -> None:
        self._monitor, self._pins = monitor, pins

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            self._monitor.post.remote({"kind": "checkpoint", "time": time.time()})
            if self._pins is not None:
                take_pin(self._pins, Path(checkpoint.path), self._monitor)


def take_pin(pins: Pins, checkpoint: Path, monitor: Any) -> None:
    """Pin a checkpoint, if it is one to pin, and tell the driver where."""
    try:
        pin = pins.take(checkpoint)
    except OSError as error:
        text = f"the checkpoint {checkpoint.name} cannot be kept for the search: {error.strerror or error}"
        monitor.post.remote({"kind": "failed", "text": text})
        raise
    if pin is not None:
        monitor.post.remote({"kind": "pinned", "place": str(pin)})
