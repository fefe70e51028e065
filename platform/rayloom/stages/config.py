"""The `stage` part of the job file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayloom.config.part import ConfigPart, Number


class StageConfig(ConfigPart):
    """The training approach."""

    type: Literal["pretrain", "sft"] = "sft"
    """`pretrain`: learn every token of plain texts. `sft`: supervised fine-tuning on the answers of conversations."""
    neftune: Number | None = Field(default=None, gt=0)
    """NEFTune (Jain et al. 2023, https://arxiv.org/abs/2310.05914), for `sft`: uniform noise on the embeddings in
    training, of this strength over the square root of length times width; above 0, usually 5 to 15. Left out: none."""

    @model_validator(mode="after")
    def _neftune_is_for_sft(self) -> StageConfig:
        if self.neftune is not None and self.type != "sft":
            raise ValueError(f"neftune is for stage sft, not {self.type}")
        return self
