"""The learning rate as a pure function of how much of the training is done."""

from __future__ import annotations

import math
from typing import Any


def learning_rate_factor(progress: float, scheduler: str, warmup: float) -> float:
    """Share of the peak learning rate at `progress` (0 to 1) of the training.

    Rises linearly from 0 over the first `warmup` (0 to below 1) of the training; then `constant` stays at 1, `linear`
    falls to 0, `cosine` falls to 0 along half a cosine (Loshchilov & Hutter 2016, without restarts).

    A step is given the value at its middle, so neither the first nor the last step is made at a rate of 0.
    """
    if progress < warmup:
        return progress / warmup
    done = min(1.0, (progress - warmup) / (1.0 - warmup))
    if scheduler == "constant":
        return 1.0
    if scheduler == "linear":
        return 1.0 - done
    if scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"unknown scheduler {scheduler!r}")


class ProgressSchedule:
    """Stands where transformers wants a learning rate scheduler. Holds no state: the trainer sets the rate."""

    def __init__(self, optimizer: Any, peak: float) -> None:
        self._optimizer = optimizer
        self._peak = peak
        self._rate = 0.0

    def set(self, factor: float) -> None:
        """Set every parameter group to `factor` (0 to 1) of the peak rate, times its own `lr_ratio` (LoRA+)."""
        self._rate = self._peak * factor
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * group.get("lr_ratio", 1.0)

    def get_last_lr(self) -> list[float]:
        return [self._rate]

    def step(self) -> None:
        """Nothing to do: `set` is called before the step that it is for."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
