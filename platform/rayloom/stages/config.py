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


class DpoConfig(ConfigPart):
    """Preference training: of two answers to a prompt, the chosen one is made likelier than the rejected one."""

    type: Literal["dpo"] = "dpo"
    """`dpo`: chosen answers are preferred to rejected ones."""
    loss: Literal[
        "sigmoid", "robust", "hinge", "ipo", "kto_pair", "bco_pair", "apo_zero", "apo_down", "sppo_hard", "nca_pair",
        "exo_pair", "aot", "discopop", "cpo", "simpo", "orpo"
    ] = "sigmoid"  # fmt: skip
    """Of each pair: `sigmoid` is DPO; what the others are is in `rayloom/losses/preference.py`. `cpo`, `simpo` and
    `orpo` need no reference; that of the others is the model with its adapter off."""
    beta: Number = Field(default=0.1, gt=0)
    """How much a change from the reference weighs, above 0; of `orpo` the weight of its odds ratio, and `simpo` wants 2
    and more."""
    label_smoothing: Number | None = Field(default=None, ge=0, lt=0.5)
    """Share of the pairs that are held to be the wrong way round, 0 to below a half; for `sigmoid`, `robust`, `aot`,
    `cpo` (default 0), and `exo_pair` (default 0.001)."""
    gamma: Number | None = Field(default=None, ge=0)
    """For `simpo`: by how much the chosen answer's reward must be the larger, 0 or above; default 0.5."""
    ftx: Number = Field(default=0.0, ge=0)
    """Weight of a second term, 0 or above: the mean negative log-likelihood of the chosen answer's tokens."""

    @model_validator(mode="after")
    def _belongs_to_its_loss(self) -> DpoConfig:
        if self.label_smoothing is not None and self.loss not in _SMOOTHED:
            raise ValueError(f"label_smoothing is for the losses {', '.join(_SMOOTHED)}, not {self.loss}")
        if self.loss == "exo_pair" and self.label_smoothing == 0:
            raise ValueError("label_smoothing of exo_pair must be above 0; its logarithm is in the loss")
        if self.gamma is not None and self.loss != "simpo":
            raise ValueError(f"gamma is for loss simpo, not {self.loss}")
        return self

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.loss not in ("cpo", "simpo", "orpo")


_SMOOTHED = ("sigmoid", "robust", "aot", "cpo", "exo_pair")

StageConfig = Annotated[PretrainConfig | SftConfig | DpoConfig, Field(discriminator="type")]
