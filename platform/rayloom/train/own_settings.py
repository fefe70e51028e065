"""What a resumed job says of its optimizer goes before what the checkpoint says."""

from __future__ import annotations

from typing import Any

import transformers


class OwnSettings(transformers.TrainerCallback):
    """A checkpoint's optimizer state brings the weight decay of then back, and under DeepSpeed the clipping. The job
    may have others now. (The learning rate is set before each step.)

    Args:
        optimizer: as the job has made it, before a checkpoint is loaded.
    """

    def __init__(self, optimizer: Any) -> None:
        self._decays = [group.get("weight_decay") for group in _filled(optimizer)]

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """The model is wrapped for training, and the checkpoint is loaded."""
        groups = _filled(optimizer)
        if len(groups) == len(self._decays):  # else DeepSpeed has split them
            for group, decay in zip(groups, self._decays, strict=True):
                if decay is not None:
                    group["weight_decay"] = decay
        sharded: Any = getattr(optimizer, "optimizer", None)
        if hasattr(sharded, "clip_grad"):  # of ZeRO
            sharded.clip_grad = args.max_grad_norm


def _filled(optimizer: Any) -> list[dict[str, Any]]:
    """The groups that hold weights; DeepSpeed leaves out those that are empty."""
    return [group for group in optimizer.param_groups if group["params"]]
