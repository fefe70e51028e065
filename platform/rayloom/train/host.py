"""Who runs a job from within a Ray session of its own: a search, for one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rayloom.train.config import TrainConfig
from rayloom.train.pins import Pins
from rayloom.train.report import MetricsRow

_PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class Host:
    """What a job's driver has to do with its host."""

    take: Callable[[MetricsRow], None]
    """Called with every row of metrics, after it was written."""
    stop: threading.Event
    """Set: the job ends with a checkpoint after the step that it is in."""
    jobs: int = 1
    """How many jobs like this one share the cluster."""
    pins: Pins | None = None
    """Which checkpoints are to be pinned, if any."""
    pinned: Callable[[Path], None] = lambda pin: None
    """Called with every pin, after the rows of metrics up to its step."""

    def patient(self, train: TrainConfig) -> TrainConfig:
        """The host knows that there is room, but a job before this one may still be saving its checkpoint."""
        return train.model_copy(update={"wait_for_resources": max(train.wait_for_resources, _PATIENCE_SECONDS)})
