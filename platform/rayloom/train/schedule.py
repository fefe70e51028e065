"""The learning rate as a pure function of how much of the training is done."""

from __future__ import annotations

import math


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
