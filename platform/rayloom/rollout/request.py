"""What goes to the fleet and what comes back: prompts out, rollouts back, new weights out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayloom.errors import JobError, RequestError
from rayloom.rollout.digest import digest_of

BLOCK = 32
"""Tokens of a block of the engines' prefix cache."""
PROBE_CHOICES = 8
"""Likeliest next tokens that a probe tells."""


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is started with."""

    model: str
    """`model.path`."""
    precision: str
    """"bf16", "fp16" or "fp32"."""
    max_length: int
    """Longest prompt and answer together, in tokens."""
    adapter_rank: int | None = None
    """Highest rank of an adapter that it may get; None: it gets whole weights, or none."""
    device: Literal["cpu", "gpu"] = "cpu"
    tensor_parallel: int = 1
    kv_cache_gib: float = 1.0
    gpu_memory: float = 0.85
    sleeps: bool = False
    """Whether it gives its GPU's memory up after every round of answers, until it is given new weights or prompts."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer, besides those that the model's folder names."""
    seed: int = 0
    trust_remote_code: bool = False
    revision: str | None = None
    """`model.revision`."""

    def check_lengths(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Refuse a prompt that with its answer is longer than an engine takes.

        Raises:
            RequestError: there is one.
        """
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        if longest + sampling.max_tokens > self.max_length:
            raise RequestError(
                f"rollout.max_tokens: {sampling.max_tokens}: with a prompt of {longest} tokens it passes the engines' "
                f"length of {self.max_length}"
            )


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

    def work(self, max_tokens: int) -> int:
        """Tokens that it may cost: its own once (its answers share them in the prefix cache), and its answers'."""
        return len(self.token_ids) + self.samples * max_tokens


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

    def __post_init__(self) -> None:
        if any(math.isnan(one) for one in self.log_probs):
            raise JobError(
                f"engine {self.engine} answered prompt {self.prompt} with log-probabilities that are no numbers; look "
                f"at the weights of policy version {self.policy_version}"
            )


@dataclass(frozen=True)
class Weights:
    """One policy version on its way from the trainer to the engines."""

    version: int
    kind: Literal["adapter", "full", "base"]
    """`base`: none; the model as the engines have loaded it."""
    tensors: Any
    """Reference (Ray's object store): of an adapter to its file (`adapter_folders.pack`), of whole weights to
    `{name: tensor}` on CPU, as transformers names them."""
    count: int
    """How many tensors there are."""
    digest: str
    """`rollout.digest.digest_of` the tensors."""
    adapter_config: dict[str, Any] | None
    """PEFT's `adapter_config.json`, of an adapter."""

    @classmethod
    def of_base(cls) -> Weights:
        """The model as it is, for engines that no trainer sends anything."""
        return cls(0, "base", None, 0, digest_of({}), None)


@dataclass(frozen=True)
class Served:
    """Which weights an engine serves, by what it holds in its memory."""

    engine: int
    version: int
    count: int
    """Tensors that it has taken."""
    digest: str
    """Of what it has taken, as `Weights.digest`."""


@dataclass(frozen=True)
class Probe:
    """What an engine computes with the weights that it serves. It is answered beside the first prompts that come after
    them, so that a sync does not wait for a pass through the model."""

    engine: int
    version: int
    token_ids: tuple[int, ...]
    """(choices,) the likeliest tokens behind the probe prompt under these weights, the likeliest first."""
    log_probs: tuple[float, ...]
    """(choices,) of each of them, at temperature 1."""


def probe_prompt(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """A prompt for probes: the ids given, repeated or cut so that they fill a block of the prefix cache, where a stale
    one would show, and no more."""
    return (token_ids * -(-(BLOCK + 1) // len(token_ids)))[: BLOCK + 1]


def difference(weights: Weights, served: Served) -> str | None:
    """How what an engine serves differs from what was sent; None: it does not."""
    sent = {"version": weights.version, "tensors": weights.count, "digest": weights.digest}
    serves = {"version": served.version, "tensors": served.count, "digest": served.digest}
    faults = [f"{name} {serves[name]} instead of {sent[name]}" for name in sent if serves[name] != sent[name]]
    return f"engine {served.engine} serves " + ", ".join(faults) if faults else None
