"""The `stage` part of the job file."""

from __future__ import annotations

from typing import Literal

from rayloom.config.part import ConfigPart


class StageConfig(ConfigPart):
    """The training approach."""

    type: Literal["sft"] = "sft"
    """`sft`: supervised fine-tuning on the answers of conversations."""
