"""What a resumed job says of its optimizer goes before what the checkpoint says."""

from __future__ import annotations

from typing import Any

import transformers

_KEYS = ("weight_decay", "lr_ratio")


class OwnSettings(transformers.TrainerCallback):
    """A checkpoint's optimizer state brings the weight decay of then back, the ratio of a group's learning rate to the
    job's, and under DeepSpeed the clipping. The job may have others now. (The learning rate is set before each step.)

    Args:
        optimizer: as the job has made it, before a checkpoint is loaded.
    """

    def __init__(self, optimizer: Any) -> None:
        self._own = [{key: group[key] for key in _KEYS if key in group} for group in _filled(optimizer)]

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """The model is wrapped for training, and the checkpoint is loaded."""
        groups = _filled(optimizer)
        if len(groups) == len(self._own):  # else DeepSpeed has split them
            for group, own in zip(groups, self._own, strict=True):
                group.update(own)
        sharded: Any = getattr(optimizer, "optimizer", None)
        if hasattr(sharded, "clip_grad"):  # of ZeRO
            sharded.clip_grad = args.max_grad_norm


def _filled(optimizer: Any) -> list[dict[str, Any]]:
    """The groups that hold weights; DeepSpeed leaves out those that are empty."""
    return [group for group in optimizer.param_groups if group["params"]]
