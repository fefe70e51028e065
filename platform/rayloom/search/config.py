"""The `search` part of the job file: what is tried, what it is judged by, and when a trial is given up."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rayloom.config.part import ConfigPart, Number, Whole
from rayloom.search.space import Entry, parse_space


class SearchConfig(ConfigPart):
    """For `rayloom tune`: trials of this job with other values. `rayloom train` leaves it aside."""

    metric: str = Field(min_length=1)
    """What trials are compared by: a number of the rows of `metrics.jsonl`, such as `eval_loss` or `loss`. Where trials
    are pipelines, of their last step. What begins with `eval_` needs `data.eval` or `data.held_out`."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is the best."""
    space: dict[str, Any] = Field(min_length=1)
    """Keys of the job, as an override writes them (`data.train[0].weight`), and what they are drawn from:
    `loguniform(low, high)`, `uniform(low, high)`, `randint(low, high)` with both ends, `choice(a, b)`, `grid(a, b)`.
    Or as a mapping, `{choice: [a, b], when: {method.type: lora}}`: with `when` the key is set only where these keys
    have these values (a list: one of them). Of a pipeline a key of one step is `steps.NAME.train.learning_rate`, and a
    key without a step is one of all steps."""
    samples: Whole = Field(default=10, ge=1)
    """Trials; at least 1. Each combination of `grid` values gets so many. With searcher `grid` it does not count."""
    searcher: Literal["random", "grid", "optuna", "hyperopt"] = "random"
    """Who proposes values: `random` draws them, `grid` takes every combination, `optuna` and `hyperopt` learn from the
    trials before (extra `search`)."""
    scheduler: Literal["none", "asha", "median", "population"] = "none"
    """Which trials are stopped early: `asha`, those that are not among the best 1/`reduction` at a rung; `median`,
    those whose best value is worse than the median of the other trials' means so far. `population` (population based
    training) stops none: at each `interval` the worst trials go on from checkpoints of the best ones, with changed
    values."""
    grace: Number = Field(default=0.1, gt=0, lt=1)
    """Share of a trial's training before which it is not stopped, and of asha the first rung; above 0, below 1."""
    reduction: Number = Field(default=3.0, gt=1)
    """For asha: each rung is so many times as far as the one before, and one trial of so many goes on; above 1."""
    interval: Number = Field(default=0.2, gt=0, lt=1)
    """For population: share of a trial's training between two comparisons; above 0, below 1. Rounded to steps at which
    the metric comes."""
    quantile: Number = Field(default=0.25, gt=0, le=0.5)
    """For population: share of the trials that take over a checkpoint, and of those that they take it from; above 0, at
    most 0.5. Rounded up, but no more than half of the trials."""
    resample: Number = Field(default=0.25, ge=0, le=1)
    """For population: how likely a value that is taken over is drawn anew, and not changed a little; 0 to 1."""
    perturb: Number = Field(default=0.2, gt=0, lt=1)
    """For population: a number that is changed a little becomes larger or smaller by this share of it, within its
    range; above 0, below 1. Of listed values the next or the one before is taken."""
    concurrent: Whole | None = Field(default=None, ge=1)
    """Most trials at a time; at least 1. Left out, or more than that: as many as the cluster holds."""
    seed: Whole = Field(default=42, ge=0)
    """Seed of what is proposed. All trials train with `train.seed`."""

    @property
    def entries(self) -> list[Entry]:
        """`space`, read."""
        return parse_space(self.space)

    @field_validator("space")
    @classmethod
    def _space_reads(cls, space: dict[str, Any]) -> dict[str, Any]:
        parse_space(space)
        return space

    @model_validator(mode="after")
    def _searcher_takes_the_space(self) -> SearchConfig:
        for entry in self.entries:
            if self.searcher == "grid" and entry.kind not in ("grid", "choice"):
                raise ValueError(
                    f"searcher grid takes every combination, and {entry.key} is {entry.kind}; use grid or choice for it"
                )
            if self.searcher in ("optuna", "hyperopt") and self.scheduler == "population":
                raise ValueError(f"scheduler population changes values itself; leave searcher {self.searcher} out")
            if self.searcher in ("optuna", "hyperopt") and entry.kind == "grid":
                raise ValueError(f"searcher {self.searcher} chooses by itself; use choice for {entry.key}, not grid")
        return self
