"""The `rewards` part of the job file: what an answer is worth is the weighted sum of these."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rayloom.config.part import ConfigPart, Number, Whole


class Reward(ConfigPart):
    """What all rewards have."""

    weight: Number = 1.0
    """What it counts in the sum; may be negative."""
    name: str | None = Field(default=None, min_length=1, max_length=60, pattern=r"^[A-Za-z0-9_.-]+$")
    """What it is called in the metrics (`reward/NAME`). Left out: its type."""


class FunctionReward(Reward):
    """A Python function of your own, such as one that checks the answer."""

    type: Literal["function"]
    """`function`: a function in a Python file."""
    path: str = Field(min_length=1)
    """`FILE.py:FUNCTION`, called as `FUNCTION(prompts, answers, references)` with three lists of texts of the same
    length; it returns as many numbers. `references`: the answers that the data has, or empty texts."""
    timeout: Number = Field(default=60.0, gt=0)
    """Seconds for one call, above 0."""


class HttpReward(Reward):
    """A server that scores texts."""

    type: Literal["http"]
    """`http`: `POST` of `{"prompts": [...], "answers": [...], "references": [...]}`, answered by
    `{"scores": [...]}`."""
    url: str = Field(pattern=r"^https?://.+")
    """Address of the server: `http://HOST:PORT/PATH`, what is not ASCII in it percent-encoded."""
    batch_size: Whole = Field(default=32, ge=1)
    """Texts in one request, at least 1."""
    timeout: Number = Field(default=30.0, gt=0)
    """Seconds for one request, from the connection to the answer's last byte, above 0."""
    retries: Whole = Field(default=3, ge=0)
    """How often a request that failed is made again, 0 or above."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        odd = next((letter for letter in url if not "!" <= letter <= "~"), None)
        if odd is not None:
            raise ValueError(f"{url!r}: {odd!r} cannot stand in an address; write it percent-encoded, a host in ASCII")
        try:
            parts = urlsplit(url)
            if not parts.hostname:
                raise ValueError("it names no host")
            if parts.netloc.endswith(":") or parts.port == 0:  # reading the port refuses what is no number of one
                raise ValueError("behind the colon of the host there is no port")
        except ValueError as error:
            raise ValueError(f"{url!r} is no address: {error}") from None
        return url


class AdapterReward(Reward):
    """A reward model that shares the policy's base: an adapter and a value head, as stage `reward` saves them."""

    type: Literal["adapter"]
    """`adapter`: the base model with another adapter."""
    path: str = Field(min_length=1)
    """The `model/` folder of a job of stage `reward` with `method: lora`, on the same `model.path`."""


class ModelReward(Reward):
    """A reward model of its own."""

    type: Literal["model"]
    """`model`: a second model, with the value head that stage `reward` saves."""
    path: str = Field(min_length=1)
    """The `model/` folder of a job of stage `reward`."""


class LengthReward(Reward):
    """A penalty on long answers, that of DAPO (https://arxiv.org/abs/2503.14476, equation 13): 0 up to `free` tokens,
    then falling to -1 at `longest`."""

    type: Literal["length"]
    """`length`: less for long answers."""
    free: Whole = Field(ge=0)
    """Tokens without penalty, 0 or above."""
    longest: Whole = Field(ge=1)
    """Tokens from which on the penalty is whole; above `free`."""


class FormatReward(Reward):
    """1 where the whole answer matches a pattern, else 0."""

    type: Literal["format"]
    """`format`: answers of a form."""
    pattern: str = Field(min_length=1)
    """Regular expression that the whole answer must match, as Python's `re` reads it; `.` matches line ends too."""
    timeout: Number = Field(default=1.0, gt=0)
    """Seconds for one answer, above 0: some expressions take years for some texts."""


class UnfinishedReward(Reward):
    """1 where the answer was cut off at `rollout.max_tokens`, else 0: give it a negative weight."""

    type: Literal["unfinished"]
    """`unfinished`: answers that were cut off."""


RewardSource = Annotated[
    FunctionReward | HttpReward | AdapterReward | ModelReward | LengthReward | FormatReward | UnfinishedReward,
    Field(discriminator="type"),
]


class RewardsConfig(ConfigPart):
    """Where rewards come from, and what is done to their sum."""

    sources: list[RewardSource] = Field(min_length=1, max_length=16)
    """Their weighted sum is an answer's reward; at least one."""
    normalize: bool = False
    """Divide by the deviation of all rewards of the training so far, less their mean."""
    whiten: bool = False
    """The sums of each round get mean 0 and deviation 1, over all of its answers; in place of `normalize`."""
    clip: Number | None = Field(default=None, gt=0)
    """Bound of the reward's absolute value, above 0, after `normalize` or `whiten`. Left out: none."""

    @model_validator(mode="after")
    def _scaled_once(self) -> RewardsConfig:
        if self.normalize and self.whiten:
            raise ValueError("normalize takes the moments of the whole training, whiten those of a round; say one")
        return self
