"""The `stage` part of the job file for `ppo`: reinforcement learning on the model's own answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayloom.config.part import ConfigPart, Number, Whole
from rayloom.stages.stage import Stage

AdvantageName = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++"]
GROUPED: tuple[AdvantageName, ...] = ("grpo", "dr_grpo", "rloo")
"""Advantages that compare several answers to one prompt."""


class KlConfig(ConfigPart):
    """How far the policy may go from the reference."""

    coefficient: Number = Field(default=0.05, ge=0)
    """Weight of the divergence from the reference, 0 or above; with `target` the one to begin with."""
    target: Number | None = Field(default=None, gt=0)
    """Change the coefficient so that the divergence of an answer, summed over its tokens, comes to this; above 0
    (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2). Left out: the coefficient stays."""
    horizon: Whole = Field(default=10_000, ge=1)
    """With `target`: answers over which the coefficient follows; at least 1."""
    estimator: Literal["auto", "k1", "k2", "k3"] = "auto"
    """Of each token's divergence, from the log-ratio r = log p - log p_ref of the token drawn: `k1` r, `k2` r^2 / 2,
    `k3` exp(-r) - 1 + r (http://joschu.net/blog/kl-approx.html). `auto`: k1 in the reward, k3 in the loss, where k1
    would do nothing: the mean of its gradient is 0."""
    place: Literal["auto", "reward", "loss"] = "auto"
    """Where it counts: taken off the `reward` of each token, or added to the `loss`. `auto`: `reward` for `gae`, `rloo`
    and `reinforce++`, `loss` for `grpo` and `dr_grpo`, as their papers have it."""

    @model_validator(mode="after")
    def _can_follow(self) -> KlConfig:
        if self.target is not None and self.coefficient == 0:
            raise ValueError("target changes the coefficient by a factor, and 0 stays 0; begin with one above 0")
        return self


class PpoConfig(Stage):
    """Reinforcement learning: the model answers prompts, answers get rewards, the model learns from them."""

    rows = "prompts"
    measures = ("reward", "answer_tokens")
    large_loss = None  # the value's error has the scale of the rewards

    type: Literal["ppo"] = "ppo"
    """`ppo`: proximal policy optimization (Schulman et al. 2017, https://arxiv.org/abs/1707.06347)."""
    advantage: AdvantageName = "gae"
    """What an answer's tokens were worth: `gae`, with a value head (Schulman et al. 2015,
    https://arxiv.org/abs/1506.02438); without one, of several answers to a prompt `grpo`
    (https://arxiv.org/abs/2402.03300), `dr_grpo` (https://arxiv.org/abs/2503.20783) and `rloo`
    (https://arxiv.org/abs/2402.14740); `reinforce++` (https://arxiv.org/abs/2501.03262)."""
    prompts: Whole = Field(default=32, ge=1)
    """Prompts of a round, of all workers together, at least 1: they are answered by one policy version, then learnt
    from. A multiple of `train.workers`; times `samples` a multiple of an optimizer step's rows."""
    samples: Whole | None = Field(default=None, ge=1)
    """Answers to each prompt, at least 1; of `grpo`, `dr_grpo` and `rloo` at least 2. Left out: 1, of those 4."""
    epochs: Whole = Field(default=2, ge=1)
    """How often a round's answers are learnt from; at least 1."""
    gamma: Number = Field(default=1.0, gt=0, le=1)
    """Discount of later rewards, above 0 to 1."""
    gae_lambda: Number = Field(default=0.95, ge=0, le=1)
    """For `gae`: 0 trusts the value head, 1 the rewards."""
    whiten: bool = True
    """For `gae` and `reinforce++`: advantages of a round get mean 0 and deviation 1, over all of its tokens."""
    clip: Number = Field(default=0.2, gt=0, lt=1)
    """By how much the probability ratio of a token may fall, above 0 to below 1; and rise, unless `clip_high` says."""
    clip_high: Number | None = Field(default=None, gt=0)
    """By how much it may rise, above 0 (https://arxiv.org/abs/2503.14476, section 3.1). Left out: `clip`."""
    dual_clip: Number | None = Field(default=None, gt=1)
    """Of a negative advantage: bound of the ratio, above 1, usually 3 (https://arxiv.org/abs/1912.09729, equation 5).
    Left out: none."""
    value_weight: Number = Field(default=0.1, ge=0)
    """For `gae`: weight of the value head's loss, 0 or above."""
    value_clip: Number | None = Field(default=0.2, gt=0)
    """For `gae`: by how much a value may leave the one before the round, above 0; null: freely."""
    value_learning_rate: Number | None = Field(default=None, gt=0)
    """For `gae`: peak learning rate of the value head, above 0. Left out: `train.learning_rate`."""
    entropy: Number = Field(default=0.0, ge=0)
    """Weight of the policy's entropy, 0 or above, which is taken off the loss."""
    kl: KlConfig = KlConfig()
    reference: Literal["adapter_off", "copy"] = "adapter_off"
    """What `kl` compares with, the model as it was before this training: `adapter_off`, or `copy`, a second copy of the
    weights, which every method can have."""
    importance_cap: Number | None = Field(default=2.0, gt=0)
    """Where the engine's probability of a token was not the trainer's, its loss is weighted by their ratio, at most
    this, above 0 (truncated importance sampling); null: no such weight."""

    @model_validator(mode="after")
    def _fits_its_advantage(self) -> PpoConfig:
        if self.advantage in GROUPED and self.samples == 1:
            raise ValueError(f"samples 1: {self.advantage} compares several answers to a prompt; say at least 2")
        if self.kl_place == "loss" and self.kl.estimator == "k1":
            raise ValueError(
                "kl.estimator k1 in the loss has a gradient whose mean is 0; say k3 or k2, or place: reward"
            )
        if self.advantage != "gae" and self.value_learning_rate is not None:
            raise ValueError(f"value_learning_rate is for advantage gae, not {self.advantage}")
        return self

    @property
    def answers(self) -> int:
        """Answers to each prompt."""
        return self.samples or (4 if self.advantage in GROUPED else 1)

    @property
    def has_value_head(self) -> bool:
        return self.advantage == "gae"

    @property
    def has_reference(self) -> bool:
        return self.kl.coefficient > 0 or self.kl.target is not None

    @property
    def kl_estimator(self) -> Literal["k1", "k2", "k3"]:
        """What each token's divergence is estimated by."""
        if self.kl.estimator != "auto":
            return self.kl.estimator
        return "k3" if self.kl_place == "loss" else "k1"

    @property
    def kl_place(self) -> Literal["reward", "loss"]:
        """Where the divergence counts."""
        if self.kl.place != "auto":
            return self.kl.place
        return "loss" if self.advantage in ("grpo", "dr_grpo") else "reward"
