"""Tells the driver of each checkpoint that counts. A file of its own: Ray Train's controller loads it, which has what
it needs already."""

from __future__ import annotations

import time
from typing import Any

from ray.train import Checkpoint, UserCallback


class CheckpointNews(UserCallback):
    """Called in the controller when Ray Train has put a checkpoint on its list; posts to the driver's monitor."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            self._monitor.post.remote({"kind": "checkpoint", "time": time.time()})
