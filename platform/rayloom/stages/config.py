"""The `stage` part of the job file: the training approach, each with the keys that are its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayloom.config.part import Number, Whole
from rayloom.stages.ppo_config import PpoConfig
from rayloom.stages.stage import Stage

Reference = Literal["adapter_off", "copy", "cached"]


class PretrainConfig(Stage):
    """Learn every token of plain texts."""

    rows = "texts"
    measures = ("perplexity", "accuracy")
    large_loss = 20.0  # a model that knows nothing has the logarithm of its vocabulary's size, 10 to 13

    type: Literal["pretrain"] = "pretrain"
    """`pretrain`: every token of plain texts is learnt."""


class SftConfig(Stage):
    """Supervised fine-tuning on the answers of conversations."""

    rows = "conversations"
    measures = ("perplexity", "accuracy")
    large_loss = 20.0  # a model that knows nothing has the logarithm of its vocabulary's size, 10 to 13

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


class RewardConfig(Stage):
    """Reward model: a head on the model gives every answer a number, the larger the better the answer."""

    rows = "pairs"
    measures = ("rewards/chosen", "rewards/rejected", "rewards/margin", "accuracy")

    type: Literal["reward"] = "reward"
    """`reward`: a value head learns to give chosen answers more than rejected ones, by the logistic loss of the
    difference (Bradley-Terry; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1)."""
    center: Number = Field(default=0.0, ge=0)
    """Weight of a second term, 0 or above: the square of the two rewards' sum, which keeps rewards around 0 (Eisenstein
    et al. 2023, https://arxiv.org/abs/2312.09244, section 2)."""
    head_learning_rate: Number | None = Field(default=None, gt=0)
    """Peak learning rate of the value head, above 0, which begins at random. Left out: `train.learning_rate`."""


PairLossName = Literal[
    "sigmoid", "robust", "hinge", "ipo", "kto_pair", "bco_pair", "apo_zero", "apo_down", "sppo_hard", "nca_pair",
    "exo_pair", "aot", "discopop", "cpo", "simpo", "orpo"
]  # fmt: skip
Weight = Annotated[Number, Field(gt=0)]


class DpoConfig(Stage):
    """Preference training: of two answers to a prompt, the chosen one is made likelier than the rejected one."""

    rows = "pairs"
    measures = ("rewards/chosen", "rewards/rejected", "rewards/margin", "accuracy")

    type: Literal["dpo"] = "dpo"
    """`dpo`: chosen answers are preferred to rejected ones."""
    loss: PairLossName | Annotated[dict[PairLossName, Weight], Field(min_length=1)] = "sigmoid"
    """Of each pair: `sigmoid` is DPO; what the others are is in `rayloom/losses/preference.py`. `cpo`, `simpo` and
    `orpo` need no reference. Several with their weights, above 0, such as `{sigmoid: 0.8, bco_pair: 0.2}`, are added
    up."""
    reference: Reference = "adapter_off"
    """What the other losses compare with, the model as it was before this training: `adapter_off`, the model with its
    adapter off, of which there is one copy; `copy`, a second copy of the weights in memory; or `cached`, the same as
    `copy` without its memory: the log-probabilities of all rows, computed before the training and kept in
    `output_dir/reference`, where later jobs find them. Every method can have the last two."""
    beta: Number = Field(default=0.1, gt=0)
    """How much a change from the reference weighs, above 0; of `orpo` the weight of its odds ratio, and `simpo` wants 2
    and more."""
    label_smoothing: Number | None = Field(default=None, ge=0, lt=0.5)
    """Share of the pairs that are held to be the wrong way round, 0 to below a half; for `sigmoid`, `robust`, `aot`,
    `cpo` (default 0), and `exo_pair` (default 0.001)."""
    gamma: Number | None = Field(default=None, ge=0)
    """For `simpo`: by how much the chosen answer's reward must be the larger, 0 or above; default 0.5."""
    ftx: Number = Field(default=0.0, ge=0)
    """Weight of a further term, 0 or above: the mean negative log-likelihood of the chosen answer's tokens."""
    ld_alpha: Number | None = Field(default=None, ge=0, le=1)
    """LD-DPO (Liu et al. 2024, https://arxiv.org/abs/2409.06411): what the log-probabilities of a longer answer's
    tokens behind the shorter one's length count, 0 to 1; 1 is as without it. For losses with a reference."""

    @model_validator(mode="after")
    def _belongs_to_its_loss(self) -> DpoConfig:
        names = ", ".join(self.weights)
        if self.label_smoothing is not None and not self.weights.keys() & {*SMOOTHED}:
            raise ValueError(f"label_smoothing is for the losses {', '.join(SMOOTHED)}, not {names}")
        if "exo_pair" in self.weights and self.label_smoothing == 0:
            raise ValueError("label_smoothing of exo_pair must be above 0; its logarithm is in the loss")
        if self.gamma is not None and "simpo" not in self.weights:
            raise ValueError(f"gamma is for loss simpo, not {names}")
        if self.reference != "adapter_off" and not self.has_reference:
            raise ValueError(f"reference {self.reference}: the loss {names} compares with no reference; leave it out")
        if self.ld_alpha is not None and (self.ftx or self.weights.keys() & {*FREE}):
            what = "ftx takes means" if self.ftx else f"the losses {', '.join(FREE)} take means"
            raise ValueError(f"ld_alpha weighs log-probabilities, of which {what}; leave one of them out")
        return self

    @property
    def weights(self) -> dict[PairLossName, float]:
        """The losses that are added up."""
        return self.loss if isinstance(self.loss, dict) else {self.loss: 1.0}

    @property
    def has_reference(self) -> bool:
        return not self.weights.keys() <= {*FREE}


SMALLER_IS_BETTER = ("loss", "perplexity")
CHOOSING = (*SMALLER_IS_BETTER, "accuracy", "rewards/margin", "reward")
"""Measures that say how good a model is; most of them the better the larger."""
SMOOTHED: tuple[PairLossName, ...] = ("sigmoid", "robust", "aot", "cpo", "exo_pair")
"""Losses that `label_smoothing` is for."""
FREE: tuple[PairLossName, ...] = ("cpo", "simpo", "orpo")
"""Losses that know no reference."""


class KtoConfig(Stage):
    """Answers that were judged one by one: good ones are made likelier, bad ones less likely."""

    rows = "judgements"
    measures = ("rewards/desirable", "rewards/undesirable", "accuracy", "divergence")

    type: Literal["kto"] = "kto"
    """`kto`: Kahneman-Tversky optimization (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306)."""
    beta: Number = Field(default=0.1, gt=0)
    """How much a change from the reference weighs, above 0."""
    desirable_weight: Number = Field(default=1.0, gt=0)
    """Weight of good answers, above 0. The paper wants this times their number to be 1 to 1.33 times the same of the
    bad ones (equation 9)."""
    undesirable_weight: Number = Field(default=1.0, gt=0)
    """Weight of bad answers, above 0."""
    reference: Reference = "adapter_off"
    """As in stage dpo: `adapter_off`; `copy`, a second copy of the weights; or `cached`, log-probabilities computed
    before the training."""

    @property
    def has_reference(self) -> bool:
        return True


class SpinConfig(Stage):
    """Self-play: the model learns to prefer the data's answers to its own, round after round."""

    rows = "conversations"
    measures = DpoConfig.measures

    type: Literal["spin"] = "spin"
    """`spin`: self-play fine-tuning (Chen et al. 2024, https://arxiv.org/abs/2401.01335). A round is a job of stage
    dpo, `sigmoid`: the data's answer is chosen, that of the last round's model rejected, and the reference is that
    model."""
    rounds: Whole = Field(default=3, ge=1, le=100)
    """Rounds, each of `train.epochs` or `train.max_steps`; 1 to 100."""
    beta: Number = Field(default=0.1, gt=0)
    """How much a change from the last round's model weighs, above 0."""


StageConfig = Annotated[
    PretrainConfig | SftConfig | RewardConfig | DpoConfig | KtoConfig | PpoConfig | SpinConfig,
    Field(discriminator="type"),
]
