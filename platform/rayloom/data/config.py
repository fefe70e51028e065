"""The `data` part of the job file."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rayloom.config.part import ConfigPart, Number, Whole
from rayloom.data.description import Description

BUILT_IN_FORMATS = ("auto", "alpaca", "sharegpt", "openai", "text")


class DatasetConfig(Description):
    """One data set of the mix."""

    path: str = Field(min_length=1)
    """A file (.jsonl, .json, .csv, .parquet, .arrow, .txt; .gz and .zst of the line formats), a folder or glob of them,
    a folder that `datasets` saved, an address (s3://, gs://, hf://, ...), a name in `data.description`, or the name
    of a data set on the Hugging Face hub."""
    subset: str | None = None
    """Subset (configuration) of a hub data set. Left out: the default one."""
    split: str = "train"
    """Split of a hub data set, or of a folder that `datasets` saved."""
    folder: str | None = None
    """Folder of a hub data set to read. Left out: what the data set says."""
    max_samples: Whole | None = Field(default=None, ge=1)
    """Use at most so many rows, chosen by the seed and the same in every epoch. Left out: all."""
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
            value = {**value, "name": PurePath(value["path"]).stem or value["path"]}
        return value


class DataConfig(ConfigPart):
    """Which data sets to train on, and how they become one stream of token rows."""

    train: list[DatasetConfig] = Field(min_length=1)
    """The data sets. A plain path stands for `{path: ...}`."""
    eval: list[DatasetConfig] = Field(default=[])
    """Data sets to evaluate on, each row once. Left out: what `held_out` keeps, or no evaluation."""
    held_out: Number = Field(default=0.0, ge=0, lt=1)
    """Share of the rows of `train` that is kept for evaluation; 0 to below 1. Told from what a row says, so a row, and
    any copy of it, is on one side in every epoch and run."""
    eval_samples: Whole = Field(default=1000, ge=1)
    """Evaluate on at most so many examples."""
    description: str | None = None
    """A `dataset_info.json` as LlamaFactory has it: what data sets there are and what their columns mean. A data set's
    `path` may then be a name in it."""
    converters: str | None = None
    """A Python file with formats of your own: a dict `CONVERTERS`, from a `format` name to a function."""
    mix: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = "concat"
    """How the sets become one epoch. `concat`: each row once, all sets shuffled together. The others draw the sets
    by weight: `interleave_under` until the first set runs out, `interleave_over` until every set ran out (short
    ones repeat), `interleave_once` until every set ran out (none repeats)."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be read, does not fit its format, or is refused by the template: end the job
    with a message that names it, or leave it out and count it in `result.json`."""
    template: str = "auto"
    """Chat template: `auto` (the model's own, else its family's), a name of the library, or a `.jinja` file's path."""
    enable_thinking: bool | None = None
    """For templates of reasoning models: with thoughts, without, or (left out) as the template does by itself."""
    train_on_prompt: bool = False
    """Learn every token, not the assistant's words only."""
    mask_history: bool = False
    """Learn the last answer of a conversation only."""
    cutoff: Whole = Field(default=2048, ge=8)
    """Longest token row. A longer example is cut: whole turns from the oldest on, then inside its longest part."""
    packing: bool = True
    """Put several short examples into one row, kept apart in attention and positions."""
    group_by_length: bool | None = None
    """Where a row is one example: let those of nearly one length follow each other, for less padding. Left out: yes
    where each example counts alike (pairs, judgements), no where each token does: there a step of short answers would
    count as much as one of long ones."""
    window: Whole = Field(default=512, ge=1)
    """Examples that are read, shuffled and packed together: the grain of reading, not of resuming."""
    store: str | None = None
    """Folder of the tokens that `rayloom data prepare` makes. Left out: `prepared` in `output_dir`. A job finds there
    what has been prepared with its own data, template, tokenizer and cutoff."""
    manifest: bool = False
    """Write to `manifest.jsonl` which rows each step trained on."""

    @model_validator(mode="after")
    def _formats_are_known(self) -> DataConfig:
        for item in [*self.train, *self.eval]:
            if item.format not in BUILT_IN_FORMATS and self.converters is None:
                raise ValueError(
                    f"{item.name}: unknown format {item.format!r}; known are {', '.join(BUILT_IN_FORMATS)}, "
                    "or name a file of your own `converters`"
                )
        return self

    @model_validator(mode="after")
    def _masks_agree(self) -> DataConfig:
        if self.train_on_prompt and self.mask_history:
            raise ValueError("`train_on_prompt` learns every token, `mask_history` the last answer only; choose one")
        return self

    @field_validator("train", "eval")
    @classmethod
    def _names_differ(cls, sets: list[DatasetConfig]) -> list[DatasetConfig]:
        twice = [name for name, count in Counter(item.name for item in sets).items() if count > 1]
        if twice:
            raise ValueError(f"two data sets are named {twice[0]!r}; give one of them another `name`")
        return sets

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> DataConfig:
        if self.eval and self.held_out:
            raise ValueError("`eval` and `held_out` are two ways to say what to evaluate on; choose one")
        if any(item.weight is not None for item in self.eval):
            raise ValueError("`eval`: every row counts once, so a `weight` says nothing; leave it out")
        return self

    @model_validator(mode="after")
    def _weights_mean_something(self) -> DataConfig:
        if self.mix == "concat" and any(item.weight is not None for item in self.train):
            raise ValueError(
                "`mix: concat` takes every row once, so a `weight` says nothing; "
                "leave the weights out or choose interleave_under, interleave_over or interleave_once"
            )
        return self
