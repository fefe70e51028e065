"""What goes to the fleet and what comes back: prompts out, rollouts back, new weights out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_tokens: int
    """Most tokens of an answer; at least 1."""
    temperature: float = 1.0
    """What logits are divided by; 0: always the likeliest token."""
    top_p: float = 1.0
    """The likeliest tokens that together have this probability, above 0 to 1."""
    top_k: int = 0
    """So many of the likeliest tokens; 0: all."""
    min_tokens: int = 0
    """Fewest tokens before an answer may end."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, besides the model's own end of a turn."""


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    number: int
    """By which its answers are known."""
    token_ids: tuple[int, ...]
    seed: int
    """Answer `sample` is drawn with `seed + sample`."""
    samples: int = 1
    """Answers to give, at least 1."""


@dataclass(frozen=True)
class Rollout:
    """One answer to a prompt."""

    prompt: int
    """`Prompt.number`."""
    sample: int
    """0 to `Prompt.samples` - 1."""
    token_ids: tuple[int, ...]
    """(answer,) the end of the turn included, where it ended by itself."""
    log_probs: tuple[float, ...]
    """(answer,) of each token, of the distribution that it was drawn from: after temperature, top-p and top-k."""
    finish_reason: Literal["stop", "length"]
    policy_version: int
    """Which weights gave it."""
    engine: int
    """Which engine gave it, 0 and up."""


@dataclass(frozen=True)
class Weights:
    """One policy version on its way from the trainer to the engines."""

    version: int
    kind: Literal["adapter", "full"]
    tensors: Any
    """Reference (Ray's object store) of `{name: tensor}`, on CPU: of an adapter as PEFT saves it, else as transformers
    does."""
    count: int
    """How many tensors there are."""
    digest: str
    """`digest_of` the tensors."""
    adapter_config: dict[str, Any] | None
    """PEFT's `adapter_config.json`, of an adapter."""


@dataclass(frozen=True)
class Probe:
    """What an engine says of the weights that it serves."""

    engine: int
    version: int
    count: int
    """Tensors that it has taken."""
    digest: str
    """Of what it has taken, as `Weights.digest`."""
    token_ids: tuple[int, ...]
    """The likeliest continuation of the probe prompt under these weights, a few tokens."""
    log_probs: tuple[float, ...]
    """Of each of them, at temperature 1."""
