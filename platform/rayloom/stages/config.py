"""The `stage` part of the job file."""

from __future__ import annotations

from typing import Literal

from rayloom.config.part import ConfigPart


class StageConfig(ConfigPart):
    """The training approach."""

    type: Literal["pretrain", "sft"] = "sft"
    """`pretrain`: learn every token of plain texts. `sft`: supervised fine-tuning on the answers of conversations."""
