"""The `method` part of the job file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayloom.config.part import ConfigPart, Number, Whole


class LoraConfig(ConfigPart):
    """Low-rank adapters on frozen weights (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    type: Literal["lora"] = "lora"
    """`lora`, also where no type is given: small adapters train, the model's own weights stay as they are."""
    rank: Whole = Field(default=8, ge=1, le=4096)
    """Rank of the two adapter factors, 1 to 4096."""
    alpha: Number | None = Field(default=None, gt=0)
    """Scale of the adapter: its product is multiplied by alpha / rank. Left out: twice the rank."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input, 0 to below 1."""
    target: Literal["all"] | list[str] = "all"
    """Modules that get an adapter: `all` (every linear layer but the output head) or a list of module names."""


class FullConfig(ConfigPart):
    """Every weight trains."""

    type: Literal["full"] = "full"
    """`full`: every weight of the model trains."""


MethodConfig = Annotated[LoraConfig | FullConfig, Field(discriminator="type")]
