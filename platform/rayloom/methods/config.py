"""The `method` part of the job file: one model for each type."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rayloom.config.part import ConfigPart, Number, Whole

Names = list[Annotated[str, Field(min_length=1)]]
MERGED_BASE = "base"
"""Folder inside a saved model with the weights that merged adapters have become part of."""


class LoraConfig(ConfigPart):
    """Low-rank adapters on frozen weights (Hu et al. 2021, https://arxiv.org/abs/2106.09685); on a quantized model it
    is QLoRA."""

    type: Literal["lora"] = "lora"
    """`lora`, also where no type is given: small adapters train, the model's own weights stay as they are."""
    rank: Whole = Field(default=8, ge=1, le=4096)
    """Rank of the two adapter factors, 1 to 4096."""
    alpha: Number | None = Field(default=None, gt=0)
    """Scale of the adapter: its product is multiplied by alpha / rank. Left out: twice the rank."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input, 0 to below 1."""
    target: Annotated[str, Field(min_length=1)] | Names = "all"
    """Modules that get an adapter: `all` (every linear layer but the output head), a list of module names (`[q_proj,
    v_proj]`), or a regular expression that a module's whole name must match."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that high ranks learn as fast (https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Learn each weight's magnitude apart from its direction (DoRA, https://arxiv.org/abs/2402.09353)."""
    init: str = "default"
    """What the factors are at first. `default`: their product is zero; `gaussian`: the same with a normal A;
    `orthogonal`: orthogonal ones; `pissa`, `pissa_niter_N` (by N steps of a fast SVD) and `olora`: the largest part of
    the weight itself, saved as plain LoRA of twice the rank; `loftq`: what 4-bit quantization has lost."""
    extra_modules: Names = Field(default=[])
    """Modules that train whole and are saved with the adapter, such as `embed_tokens` or `lm_head`."""
    adapters: Names = Field(default=[])
    """Folders of adapters that were trained before, in their order. All but the last are merged into the weights; the
    last goes on training, with the rank, alpha, target and so on that it has."""
    new_adapter: bool = False
    """Merge the last of `adapters` too, and train a new one."""

    @field_validator("init")
    @classmethod
    def _init_is_known(cls, init: str) -> str:
        if not re.fullmatch(r"default|gaussian|orthogonal|olora|pissa|pissa_niter_\d+|loftq", init):
            raise ValueError(
                f"unknown {init!r}; known are default, gaussian, orthogonal, olora, pissa, pissa_niter_N and loftq"
            )
        return init

    @model_validator(mode="after")
    def _parts_agree(self) -> LoraConfig:
        if self.new_adapter and not self.adapters:
            raise ValueError("`new_adapter` says what to do after `adapters`, and there are none; name their folders")
        if self.dora and self.changes_base:
            raise ValueError(f"`dora` and `init: {self.init}` cannot be saved as plain LoRA; choose one")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"`init: orthogonal` needs an even rank, not {self.rank}")
        if self.continues and self.init != "default":
            raise ValueError(f"`init: {self.init}` is of a new adapter; leave it out, or say `new_adapter: true`")
        return self

    @property
    def changes_base(self) -> bool:
        """Whether the start takes a part out of the model's own weights."""
        return self.init.startswith(("pissa", "olora"))

    @property
    def continues(self) -> bool:
        """Whether an adapter of before goes on training."""
        return bool(self.adapters) and not self.new_adapter

    @property
    def merged(self) -> list[str]:
        """The adapters of before that become part of the weights."""
        return self.adapters[:-1] if self.continues else self.adapters


class FullConfig(ConfigPart):
    """Every weight trains."""

    type: Literal["full"] = "full"
    """`full`: every weight of the model trains."""


class FreezeConfig(ConfigPart):
    """Some of the model's own weights train, or new layers between them; the rest stays as it is."""

    type: Literal["freeze"] = "freeze"
    """`freeze`: chosen layers and modules train, all others are frozen."""
    last: Whole = Field(default=0, ge=0)
    """Train so many layers at the end of the model; at least 0."""
    first: Whole = Field(default=0, ge=0)
    """Train so many layers at the beginning; at least 0."""
    modules: Names = Field(default=[])
    """Train only these modules of the chosen layers, such as `self_attn` or `down_proj`. Left out: whole layers."""
    extra_modules: Names = Field(default=[])
    """Modules outside the layers that train too, such as `embed_tokens`, `norm` or `lm_head`."""
    expand: Whole = Field(default=0, ge=0)
    """LLaMA-Pro: so many new layers, spread evenly, that begin as copies which change nothing; only they train
    (https://arxiv.org/abs/2401.02415). The saved model has more layers. 0: none."""

    @model_validator(mode="after")
    def _something_trains(self) -> FreezeConfig:
        if self.expand and (self.first or self.last):
            raise ValueError("`expand` trains the new layers; leave out `first` and `last`")
        if not (self.expand or self.first or self.last or self.extra_modules):
            raise ValueError("nothing would train; say how many layers (`last: 2`), `extra_modules` or `expand`")
        if self.modules and not (self.expand or self.first or self.last):
            raise ValueError("`modules` are parts of layers; say which layers (`last: 2`), or name `extra_modules`")
        return self


class OftConfig(ConfigPart):
    """Orthogonal fine-tuning: frozen weights are rotated, block by block (https://arxiv.org/abs/2306.07280); on a
    quantized model it is QOFT."""

    type: Literal["oft"] = "oft"
    """`oft`: orthogonal rotations of the inputs of frozen layers train."""
    block_size: Whole | None = Field(default=None, ge=2)
    """Inputs that are rotated together, at least 2; it must divide each layer's number of inputs. Left out: 32, or what
    `blocks` gives."""
    blocks: Whole | None = Field(default=None, ge=1)
    """Number of blocks in each layer, at least 1, in place of `block_size`."""
    target: Annotated[str, Field(min_length=1)] | Names = "all"
    """Modules that are rotated: `all` (every linear layer but the output head), a list of module names, or a regular
    expression that a module's whole name must match."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Share of the blocks that are left unrotated in a step, 0 to below 1."""
    exact: bool = False
    """Compute rotations with a matrix inverse, not with five terms of its series: slower, and exactly orthogonal."""
    constrained: Number | None = Field(default=None, gt=0)
    """Keep rotations within this distance of none (COFT); above 0. Left out: no limit."""
    shared: bool = False
    """One rotation for all blocks of a layer."""
    extra_modules: Names = Field(default=[])
    """Modules that train whole and are saved with the adapter."""

    @model_validator(mode="after")
    def _one_size(self) -> OftConfig:
        if self.block_size is not None and self.blocks is not None:
            raise ValueError("`block_size` and `blocks` are two ways to say how large a block is; choose one")
        return self


class AdapterConfig(ConfigPart):
    """LLaMA-Adapter: learned prompts in the attention of the last layers, behind gates that begin at zero
    (https://arxiv.org/abs/2303.16199)."""

    type: Literal["adapter"] = "adapter"
    """`adapter`: prompts and gates of the last layers' attention train. For Llama, Mistral and GPT-2 models."""
    prompt_length: Whole = Field(default=10, ge=1)
    """Learned tokens of each layer; at least 1."""
    layers: Whole | None = Field(default=None, ge=1)
    """How many layers, from the last on, get a prompt. Left out: all but the first two, or all of two."""


class PromptConfig(ConfigPart):
    """Prompt tuning: learned embeddings before the input (https://arxiv.org/abs/2104.08691)."""

    type: Literal["prompt"] = "prompt"
    """`prompt`: a few virtual tokens before the input train, nothing else. Needs `data.packing: false`."""
    virtual_tokens: Whole = Field(default=20, ge=1)
    """Number of virtual tokens; at least 1."""
    init_text: str | None = Field(default=None, min_length=1)
    """Begin with the embeddings of this text, repeated or cut to the number. Left out: random."""


class PTuningConfig(ConfigPart):
    """P-tuning: virtual tokens that a small network makes (https://arxiv.org/abs/2103.10385)."""

    type: Literal["p_tuning"] = "p_tuning"
    """`p_tuning`: virtual tokens before the input, made by a network, train. Needs `data.packing: false`."""
    virtual_tokens: Whole = Field(default=20, ge=1)
    """Number of virtual tokens; at least 1."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network that makes the virtual tokens."""
    encoder_size: Whole | None = Field(default=None, ge=1)
    """Width of the network; at least 1. Left out: the model's hidden size."""
    encoder_layers: Whole = Field(default=2, ge=1)
    """Layers of an LSTM, at least 1; an MLP has always three."""
    encoder_dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Dropout of an LSTM, 0 to below 1."""


class PrefixConfig(ConfigPart):
    """Prefix tuning: learned keys and values before those of the input, in every layer
    (https://arxiv.org/abs/2101.00190)."""

    type: Literal["prefix"] = "prefix"
    """`prefix`: keys and values of virtual tokens train, in every layer. Needs `data.packing: false`."""
    virtual_tokens: Whole = Field(default=20, ge=1)
    """Number of virtual tokens; at least 1."""
    projection_size: Whole | None = Field(default=None, ge=1)
    """Make the prefix by a network of this width, which trains more steadily. Left out: the prefix itself trains."""


class Ia3Config(ConfigPart):
    """IA3: learned scales of keys, values and feed-forward activations (https://arxiv.org/abs/2205.05638)."""

    type: Literal["ia3"] = "ia3"
    """`ia3`: one vector of scales for each target module trains."""
    target: Literal["auto"] | Names = "auto"
    """Modules that get a scale. `auto`: the keys, values and feed-forward layers that PEFT knows for the model."""
    feedforward: Names = Field(default=[])
    """Those of `target` whose input is scaled, not their output: the feed-forward layers."""
    extra_modules: Names = Field(default=[])
    """Modules that train whole and are saved with the adapter."""

    @model_validator(mode="after")
    def _feedforward_is_targeted(self) -> Ia3Config:
        outside = [name for name in self.feedforward if name not in self.target]
        if outside:
            raise ValueError(f"`feedforward`: {outside[0]!r} is not in `target`; name all target modules there")
        return self


class VeraConfig(ConfigPart):
    """VeRA: one pair of random frozen factors for all layers, learned scales between them
    (https://arxiv.org/abs/2310.11454)."""

    type: Literal["vera"] = "vera"
    """`vera`: two vectors of scales for each target module train."""
    rank: Whole = Field(default=256, ge=1, le=16384)
    """Rank of the random factors, 1 to 16384; they do not train, so it may be high."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input, 0 to below 1."""
    d_initial: Number = 0.1
    """What the scales between the factors are at first."""
    target: Annotated[str, Field(min_length=1)] | Names = "all"
    """Modules that get an adapter: `all`, a list of module names, or a regular expression of the whole name."""
    extra_modules: Names = Field(default=[])
    """Modules that train whole and are saved with the adapter."""


class PeftConfig(ConfigPart):
    """Any other tuner of the PEFT library, with PEFT's own fields."""

    type: Literal["peft"] = "peft"
    """`peft`: the tuner that `peft_type` names."""
    peft_type: str = Field(min_length=1)
    """PEFT's name of the tuner, such as `LOHA`, `LOKR`, `BOFT`, `HRA` or `LN_TUNING`."""
    fields: dict[str, Any] = Field(default={})
    """Fields of PEFT's configuration of that tuner, as its documentation names them. `target_modules` is every linear
    layer but the output head unless it stands here."""


MethodConfig = Annotated[
    LoraConfig
    | FullConfig
    | FreezeConfig
    | OftConfig
    | AdapterConfig
    | PromptConfig
    | PTuningConfig
    | PrefixConfig
    | Ia3Config
    | VeraConfig
    | PeftConfig,
    Field(discriminator="type"),
]
