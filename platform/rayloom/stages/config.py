"""The `stage` part of the job file: the training approach, each with the keys that are its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayloom.config.part import ConfigPart, Number


class PretrainConfig(ConfigPart):
    """Learn every token of plain texts."""

    type: Literal["pretrain"] = "pretrain"
    """`pretrain`: every token of plain texts is learnt."""


class SftConfig(ConfigPart):
    """Supervised fine-tuning on the answers of conversations."""

    type: Literal["sft"] = "sft"
    """`sft`: the answers of conversations are learnt."""
    loss: Literal["cross_entropy", "dft", "eaft"] = "cross_entropy"
    """Of each token: `cross_entropy`; `dft`, which is that times the token's own probability, held constant (Wu et al.
    2025, https://arxiv.org/abs/2508.05629); or `eaft`, times how unsure the model is, from 0 to 1
    (https://arxiv.org/abs/2601.02151). Evaluation always says the cross-entropy."""
    label_smoothing: Number = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over the whole vocabulary, 0 to below 1; for `cross_entropy`."""
    eaft_alpha: Number = Field(default=1.0, ge=0)
    """For `eaft`: the power of its weight, 0 or above; 0 is cross-entropy."""
    neftune: Number | None = Field(default=None, gt=0)
    """NEFTune (Jain et al. 2023, https://arxiv.org/abs/2310.05914): uniform noise on the embeddings in training, of
    this strength over the square root of length times width; above 0, usually 5 to 15. Left out: none."""

    @model_validator(mode="after")
    def _belongs_to_its_loss(self) -> SftConfig:
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(f"label_smoothing is for loss cross_entropy, not {self.loss}")
        if self.eaft_alpha != 1.0 and self.loss != "eaft":
            raise ValueError(f"eaft_alpha is for loss eaft, not {self.loss}")
        return self


StageConfig = Annotated[PretrainConfig | SftConfig, Field(discriminator="type")]
