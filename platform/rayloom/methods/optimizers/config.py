"""The `optimizer` part of the job file.

`train` keeps what every optimizer has: `learning_rate`, `weight_decay`, `scheduler`, `max_grad_norm`. Each class here
holds the names that take the same arguments, under the arguments' own names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayloom.config.part import ConfigPart, Number, Whole
from rayloom.methods.optimizers.support import refusals as refusals  # `JobConfig` may look at `config.py` only

Beta = Annotated[Number, Field(ge=0, lt=1)]
Positive = Annotated[Number, Field(gt=0)]
FloatType = Literal["float32", "bfloat16", "float16"]


class LibraryConfig(ConfigPart):
    """What optimizers from transformers, torch, bitsandbytes and torchao have in common."""

    lora_plus_ratio: Number | None = Field(default=None, ge=1)
    """LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354), for method `lora`: the learning rate of the B
    factors is this many times that of the A factors; at least 1, usually 4 to 16. Left out: the same rate."""
    lora_plus_embedding_rate: Number = Field(default=1e-6, gt=0)
    """Peak learning rate of LoRA factors on embeddings under `lora_plus_ratio`; above 0."""

    def arguments(self) -> dict[str, Any]:
        """The type's own keyword arguments; `beta1, beta2, …` as the tuple `betas`."""
        skipped = {"type", *LibraryConfig.model_fields}
        own = {name: value for name, value in self.model_dump().items() if name not in skipped}
        betas = tuple(own.pop(name) for name in ("beta1", "beta2", "beta3") if name in own)
        return {**own, "betas": betas} if betas else own


class _Moments(ConfigPart):
    """The constants of Adam (Kingma & Ba 2014, https://arxiv.org/abs/1412.6980)."""

    beta1: Beta = 0.9
    """Decay of the mean of the gradients, 0 to below 1."""
    beta2: Beta = 0.999
    """Decay of the mean of their squares, 0 to below 1."""
    eps: Positive = 1e-8
    """Added to the square root that divides the step; above 0."""


class AdamWConfig(LibraryConfig, _Moments):
    """AdamW (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101)."""

    type: Literal[
        "adamw_torch_fused",
        "adamw_torch",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "adamw_torch_xla",
        "adamw_torch_npu_fused",
    ] = "adamw_torch_fused"
    """`adamw_torch_fused` (torch, one kernel; also where no type is given), `adamw_torch`, bitsandbytes' `adamw_8bit`
    (also called `adamw_bnb_8bit`) and, on a GPU, its `paged_` ones; `adamw_torch_xla`, `adamw_torch_npu_fused`."""


class AdamWLowBitConfig(LibraryConfig, _Moments):
    """torchao's AdamW with its state in 4 or 8 bits. It compiles its step: the first one takes some seconds."""

    type: Literal["adamw_torch_8bit", "adamw_torch_4bit"] = "adamw_torch_8bit"
    """`adamw_torch_8bit` or `adamw_torch_4bit`."""
    block_size: Whole = Field(default=256, ge=1)
    """State entries that share a scale; at least 1."""
    bf16_stochastic_round: bool = False
    """Round weights in bf16 up or down by chance, so that small steps are not lost."""


class AnyPrecisionConfig(LibraryConfig, _Moments):
    """AdamW of torchdistx, with a choice of number formats."""

    type: Literal["adamw_anyprecision"] = "adamw_anyprecision"
    """`adamw_anyprecision`."""
    use_kahan_summation: bool = False
    """Keep what rounding takes from each weight, and add it later."""
    momentum_dtype: FloatType = "float32"
    """Number format of the mean of the gradients."""
    variance_dtype: FloatType = "float32"
    """Number format of the mean of their squares."""
    compensation_buffer_dtype: FloatType = "bfloat16"
    """Number format of what Kahan summation keeps."""


class AdafactorConfig(LibraryConfig):
    """Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235) at the job's own learning rate."""

    type: Literal["adafactor"] = "adafactor"
    """`adafactor`: of a matrix's second moments only the means of rows and columns are kept."""


class LionConfig(LibraryConfig):
    """bitsandbytes' Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675): steps of equal size by sign."""

    type: Literal["lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"] = "lion_32bit"
    """`lion_32bit`, `lion_8bit`; on a GPU also `paged_lion_32bit` and `paged_lion_8bit`."""
    beta1: Beta = 0.9
    """Share of the old mean in the direction of a step, 0 to below 1."""
    beta2: Beta = 0.999
    """Decay of the mean of the gradients, 0 to below 1; the paper's is 0.99."""


class AdemamixConfig(LibraryConfig):
    """bitsandbytes' AdEMAMix (Pagliardini et al. 2024, https://arxiv.org/abs/2409.03137): a slow and a fast mean."""

    type: Literal["ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"] = "ademamix"
    """`ademamix`, `ademamix_8bit`; on a GPU also `paged_ademamix_32bit` and `paged_ademamix_8bit`."""
    beta1: Beta = 0.9
    """Decay of the fast mean of the gradients, 0 to below 1."""
    beta2: Beta = 0.999
    """Decay of the mean of their squares, 0 to below 1."""
    beta3: Beta = 0.9999
    """Decay of the slow mean, 0 to below 1."""
    alpha: Positive = 5.0
    """Weight of the slow mean; above 0."""
    eps: Positive = 1e-8
    """Added to the square root that divides the step; above 0."""
    t_alpha: Whole | None = Field(default=None, ge=1)
    """Steps over which alpha rises to its value. Left out: it has it from the start."""
    t_beta3: Whole | None = Field(default=None, ge=1)
    """Steps over which beta3 rises to its value. Left out: it has it from the start."""


class SgdConfig(LibraryConfig):
    """Stochastic gradient descent of torch."""

    type: Literal["sgd"] = "sgd"
    """`sgd`."""
    momentum: Beta = 0.0
    """Share of the last step in the next, 0 to below 1."""
    dampening: Beta = 0.0
    """Share of the gradient that momentum leaves out, 0 to below 1."""
    nesterov: bool = False
    """Nesterov's momentum; needs a momentum above 0 and no dampening."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SgdConfig:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs a momentum above 0 and a dampening of 0")
        return self


class AdagradConfig(LibraryConfig):
    """Adagrad of torch (Duchi et al. 2011)."""

    type: Literal["adagrad"] = "adagrad"
    """`adagrad`."""
    lr_decay: Number = Field(default=0.0, ge=0)
    """The rate is divided by 1 + step * lr_decay; at least 0."""
    eps: Positive = 1e-10
    """Added to the square root that divides the step; above 0."""


class RmspropConfig(LibraryConfig):
    """RMSprop of torch."""

    type: Literal["rmsprop"] = "rmsprop"
    """`rmsprop`."""
    momentum: Beta = 0.0
    """Share of the last step in the next, 0 to below 1."""
    alpha: Beta = 0.99
    """Decay of the mean of the squared gradients, 0 to below 1."""
    eps: Positive = 1e-8
    """Added to the square root that divides the step; above 0."""
    centered: bool = False
    """Divide by the standard deviation instead of the root of the mean square."""


class BitsandbytesRmspropConfig(LibraryConfig):
    """RMSprop of bitsandbytes."""

    type: Literal["rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"] = "rmsprop_bnb"
    """`rmsprop_bnb` (32 bits, also called `rmsprop_bnb_32bit`) or `rmsprop_bnb_8bit`."""
    alpha: Annotated[Number, Field(gt=0, lt=1)] = 0.99
    """Decay of the mean of the squared gradients, above 0 and below 1."""
    eps: Positive = 1e-8
    """Added to the square root that divides the step; above 0."""


class LomoConfig(ConfigPart):
    """LOMO and AdaLomo (Lv et al. 2023, https://arxiv.org/abs/2306.09782): a step within the backward pass."""

    type: Literal["lomo", "adalomo"] = "lomo"
    """`lomo` (plain gradient steps) or `adalomo` (with factored second moments); package lomo-optim."""


class GrokAdamWConfig(ConfigPart):
    """GrokAdamW: AdamW with slowly filtered gradients added."""

    type: Literal["grokadamw"] = "grokadamw"
    """`grokadamw`: refused, for its package keeps its state where no checkpoint finds it."""


class ScheduleFreeConfig(LibraryConfig):
    """Schedule-free learning (Defazio et al. 2024, https://arxiv.org/abs/2405.15682): averages, no schedule."""

    type: Literal["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"] = "schedule_free_adamw"
    """`schedule_free_adamw`, `schedule_free_radam` or `schedule_free_sgd`; package schedulefree. Evaluated and saved
    are the averaged weights. Needs `train.scheduler: constant`."""
    weight_lr_power: Number = Field(default=2.0, ge=0)
    """Weight of a step in the average is its learning rate to this power; at least 0."""
    r: Number = Field(default=0.0, ge=0)
    """Weight of step t in the average is t to this power; at least 0."""


class StableAdamWConfig(LibraryConfig, _Moments):
    """StableAdamW (Wortsman et al. 2023, https://arxiv.org/abs/2304.13013) of torch-optimi."""

    type: Literal["stable_adamw"] = "stable_adamw"
    """`stable_adamw`; package torch-optimi."""
    decouple_lr: bool = False
    """Weight decay follows the schedule's shape and not the learning rate itself."""
    max_lr: Number | None = Field(default=None, gt=0)
    """Peak rate that `decouple_lr` reckons with. Left out: the job's."""
    kahan_sum: bool | None = None
    """Keep what rounding takes from weights in bf16 or fp16. Left out: where weights are in these formats."""


class _LowRankConfig(_Moments):
    """What GaLore and APOLLO have in common."""

    rank: Whole = Field(default=128, ge=1)
    """Rank of the projected gradients; at least 1. A matrix whose smaller side is not above it trains as AdamW does."""
    update_proj_gap: Whole = Field(default=200, ge=1)
    """Steps between two new projections; at least 1."""
    target: Literal["all"] | list[str] = "all"
    """Linear layers whose gradients are projected: `all` (but the output head) or a list of module names. Everything
    else trains as AdamW does."""


class GaloreConfig(_LowRankConfig):
    """GaLore (Zhao et al. 2024, https://arxiv.org/abs/2403.03507): moments of gradients projected by their SVD."""

    type: Literal[
        "galore_adamw",
        "galore_adamw_8bit",
        "galore_adafactor",
        "galore_adamw_layerwise",
        "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise",
    ] = "galore_adamw"
    """What keeps the projected moments: `galore_adamw`, `galore_adamw_8bit` (bitsandbytes), `galore_adafactor`. Each
    also as `_layerwise`: every weight takes its step within the backward pass and its gradient is freed, so that no two
    large gradients are in memory; this needs one worker, no gradient accumulation and `train.max_grad_norm: null`."""
    scale: Positive = 0.25
    """Steps in the projected space are multiplied by this; above 0."""
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    """Side that is projected to `rank`: `std` the shorter, `reverse_std` the longer, `left` the rows, `right` the
    columns, `full` both."""


class ApolloConfig(_LowRankConfig):
    """APOLLO (Zhu et al. 2024, https://arxiv.org/abs/2412.05270): gradients scaled as AdamW would, told at low rank."""

    type: Literal["apollo_adamw", "apollo_adamw_layerwise"] = "apollo_adamw"
    """`apollo_adamw`, or `apollo_adamw_layerwise`: every weight takes its step within the backward pass and its
    gradient is freed; this needs one worker, no gradient accumulation and `train.max_grad_norm: null`."""
    proj: Literal["random", "svd"] = "random"
    """Projection: `random` (Gaussian, by the job's seed) or `svd` of the gradient."""
    proj_type: Literal["std", "reverse_std", "left", "right"] = "std"
    """Side that is projected to `rank`: `std` the shorter, `reverse_std` the longer, `left` the rows, `right` the
    columns."""
    scale: Positive = 1.0
    """Steps are multiplied by the square root of this; above 0."""
    scale_type: Literal["channel", "tensor"] = "channel"
    """One scaling factor for each row or column (`channel`), or for a whole matrix (`tensor`). APOLLO-Mini is
    `rank: 1`, `scale_type: tensor`, `scale: 128`."""


class BadamConfig(_Moments):
    """BAdam (Luo et al. 2024, https://arxiv.org/abs/2404.02827): Adam on one block of weights at a time."""

    type: Literal["badam"] = "badam"
    """`badam`."""
    mode: Literal["layer", "ratio"] = "layer"
    """What a block is: `layer` one of the model's layers, while all others stand still; `ratio` a share of the entries
    of every weight."""
    switch_interval: Whole = Field(default=50, ge=1)
    """Optimizer steps until the next block; at least 1. The moments start anew with each block."""
    switch_mode: Literal["ascending", "descending", "random", "fixed"] = "ascending"
    """Order of the layers: first to last, last to first, `random` (each once, then a new order), or `fixed`: it never
    changes."""
    start_block: Whole | None = Field(default=None, ge=0)
    """Layer to begin with, from 0. Left out: the first one in the order."""
    outside_layers: bool = False
    """The embeddings, the last norm and the output head train too, as one more block behind the last layer."""
    update_ratio: Number = Field(default=0.05, gt=0, le=1)
    """Share of the entries in a block under mode `ratio`; above 0, at most 1."""
    mask_mode: Literal["adjacent", "scatter"] = "adjacent"
    """Entries of a block under mode `ratio`: next to each other, or strewn by the job's seed."""

    @model_validator(mode="after")
    def _fields_of_its_mode(self) -> BadamConfig:
        of_other = {
            "layer": ("update_ratio", "mask_mode"),
            "ratio": ("switch_mode", "start_block", "outside_layers"),
        }[self.mode]
        if set_ := [name for name in of_other if getattr(self, name) != type(self).model_fields[name].default]:
            raise ValueError(f"mode {self.mode} has no {' and no '.join(set_)}")
        return self


class MuonConfig(_Moments):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) on the matrices of hidden layers."""

    type: Literal["muon"] = "muon"
    """`muon`: matrices of hidden layers take orthogonalized steps; embeddings, head, norms and biases use AdamW."""
    momentum: Beta = 0.95
    """Decay of the mean of the gradients, 0 to below 1."""
    nesterov: bool = True
    """Nesterov's momentum."""
    ns_steps: Whole = Field(default=5, ge=1, lt=100)
    """Newton-Schulz iterations of a step, 1 to 99."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How the rate follows a matrix's shape: `match_rms_adamw` (Liu et al. 2025, https://arxiv.org/abs/2502.16982), so
    that one `train.learning_rate` fits both parts, or `original`."""


class AdamMiniConfig(_Moments):
    """Adam-mini (Zhang et al. 2024, https://arxiv.org/abs/2406.16793): one second moment for a block of weights."""

    type: Literal["adam_mini"] = "adam_mini"
    """`adam_mini`: a block is a head of queries or keys, a row of any other matrix, a whole norm."""


OptimizerConfig = Annotated[
    AdamWConfig
    | AdamWLowBitConfig
    | AnyPrecisionConfig
    | AdafactorConfig
    | LionConfig
    | AdemamixConfig
    | SgdConfig
    | AdagradConfig
    | RmspropConfig
    | BitsandbytesRmspropConfig
    | LomoConfig
    | GrokAdamWConfig
    | ScheduleFreeConfig
    | StableAdamWConfig
    | GaloreConfig
    | ApolloConfig
    | BadamConfig
    | MuonConfig
    | AdamMiniConfig,
    Field(discriminator="type"),
]
