"""The `data` part of the job file."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rayloom.config.part import ConfigPart, Number, Whole


class DatasetConfig(ConfigPart):
    """One data set of the mix."""

    path: str = Field(min_length=1)
    """A `.jsonl` file (one object a line) or a `.json` file (one list of objects)."""
    format: Literal["auto", "alpaca", "sharegpt", "openai"] = "auto"
    """What a row's columns mean: `alpaca` (instruction, input, output), `sharegpt` (conversations), `openai`
    (messages), or `auto`: told from the first row's columns."""
    weight: Number | None = Field(default=None, gt=0)
    """Share of this set in an interleaved mix, relative to the other sets' weights; above 0. Left out: 1."""
    name: str = ""
    """Name in metrics and messages. Left out: the file's name without its ending."""

    @model_validator(mode="before")
    @classmethod
    def _name_from_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"path": value}
        if isinstance(value, dict) and not value.get("name") and isinstance(value.get("path"), str):
            value = {**value, "name": PurePath(value["path"]).stem}
        return value


class DataConfig(ConfigPart):
    """Which data sets to train on, and how they become one stream of token rows."""

    train: list[DatasetConfig] = Field(min_length=1)
    """The data sets. A plain path stands for `{path: ...}`."""
    mix: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = "concat"
    """How the sets become one epoch. `concat`: each row once, all sets shuffled together. The others draw the sets
    by weight: `interleave_under` until the first set runs out, `interleave_over` until every set ran out (short
    ones repeat), `interleave_once` until every set ran out (none repeats)."""
    template: str = "auto"
    """Chat template: `auto` (the model's own), or the path of a `.jinja` file."""
    cutoff: Whole = Field(default=2048, ge=8)
    """Longest token row. An example that is longer is left out and counted."""
    packing: bool = True
    """Put several short examples into one row, kept apart in attention and positions."""
    window: Whole = Field(default=512, ge=1)
    """Examples that are read, shuffled and packed together: the grain of reading, not of resuming."""

    @field_validator("train")
    @classmethod
    def _names_differ(cls, sets: list[DatasetConfig]) -> list[DatasetConfig]:
        twice = [name for name, count in Counter(item.name for item in sets).items() if count > 1]
        if twice:
            raise ValueError(f"two data sets are named {twice[0]!r}; give one of them another `name`")
        return sets

    @model_validator(mode="after")
    def _weights_mean_something(self) -> DataConfig:
        if self.mix == "concat" and any(item.weight is not None for item in self.train):
            raise ValueError(
                "`mix: concat` takes every row once, so a `weight` says nothing; "
                "leave the weights out or choose interleave_under, interleave_over or interleave_once"
            )
        return self
