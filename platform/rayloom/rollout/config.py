"""The `rollout` part of the job file: the engines, and how they draw answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayloom.config.part import ConfigPart, Number, Whole
from rayloom.rollout.request import Sampling


class RolloutConfig(ConfigPart):
    """vLLM engines that answer prompts."""

    engines: Whole = Field(default=1, ge=1)
    """vLLM engines, an actor each; at least 1."""
    tensor_parallel: Whole = Field(default=1, ge=1)
    """GPUs of each engine; at least 1. On CPU 1."""
    cpus_per_engine: Number = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for each engine; above 0. On CPU the engines of a node share all of its
    cores."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What the engines compute in. `auto`: what the trainer computes in; on a CPU that multiplies float32 faster than
    bf16 (Intel's without AMX) fp32, with twice the memory for the weights."""
    max_tokens: Whole = Field(default=128, ge=1)
    """Longest answer, in tokens; at least 1. The longest prompt is `data.cutoff`."""
    min_tokens: Whole = Field(default=0, ge=0)
    """Fewest tokens before an answer may end; at least 0."""
    temperature: Number = Field(default=1.0, gt=0)
    """What logits are divided by when answers are drawn, and when the trainer computes their log-probabilities; above
    0."""
    top_p: Number = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability; above 0 to 1."""
    top_k: Whole = Field(default=0, ge=0)
    """Draw from so many of the likeliest tokens; 0: from all."""
    stop: list[str] = Field(default=[], max_length=16)
    """Texts that end an answer, besides the model's own end of a turn."""
    max_staleness: Whole = Field(default=0, ge=0, le=16)
    """By how many policy versions an answer may be older than the weights that learn from it. 0: the engines wait for
    each new version, and a run repeats itself to the bit on CPU; 1 and more: they answer the next prompts meanwhile."""
    kv_cache_gib: Number = Field(default=1.0, gt=0)
    """On CPU: memory of each engine for keys and values, in GiB; above 0."""
    gpu_memory: Number = Field(default=0.85, gt=0, le=1)
    """On a GPU: share of its memory that an engine takes; above 0 to 1."""
    share_gpus: bool = False
    """On GPUs, in stage ppo: each engine shares the GPU of a train worker. While the policy trains it sleeps, its
    weights in the memory of the host; what the worker keeps between its steps stays, and must fit beside `gpu_memory`,
    which is then at most 0.8, usually 0.5. For as many engines as workers, `tensor_parallel: 1` and `max_staleness: 0`.
    On CPU they share the cores anyway."""
    start_timeout: Number = Field(default=300.0, gt=0)
    """Seconds in which an engine must be there; above 0."""
    generate_timeout: Number = Field(default=600.0, gt=0)
    """Seconds in which an engine must have answered its share of a round's prompts; above 0."""
    sync_timeout: Number = Field(default=120.0, gt=0)
    """Seconds in which all engines must serve new weights; above 0."""
    max_restarts: Whole = Field(default=3, ge=0)
    """How often engines that died or hang are started again, in all; 0 or above. Then the job fails."""

    @property
    def gpus_per_engine(self) -> float:
        """GPUs that Ray reserves for each engine. Of a shared one more than half, so that no other engine fits."""
        return 0.6 if self.share_gpus else float(self.tensor_parallel)

    @property
    def gpus_per_worker(self) -> float:
        """GPUs that Ray reserves for each train worker: the whole, or what its engine leaves."""
        return 0.4 if self.share_gpus else 1.0

    def sampling(self, *, max_tokens: int | None = None, temperature: float | None = None) -> Sampling:
        """How answers are drawn, but for what the caller says."""
        return Sampling(
            max_tokens=max_tokens or self.max_tokens,
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_tokens=min(self.min_tokens, max_tokens or self.max_tokens),
            stop=tuple(self.stop),
        )

    @model_validator(mode="after")
    def _can_share(self) -> RolloutConfig:
        if self.share_gpus and self.tensor_parallel > 1:
            raise ValueError(
                f"share_gpus: an engine shares the one GPU of a worker, and tensor_parallel is {self.tensor_parallel}"
            )
        if self.share_gpus and self.gpu_memory > 0.8:
            raise ValueError(
                f"share_gpus: gpu_memory {self.gpu_memory:g} leaves too little for what the worker keeps; say 0.5"
            )
        if self.share_gpus and self.max_staleness:
            raise ValueError(
                f"share_gpus: the engines sleep while the policy trains, and max_staleness {self.max_staleness} would "
                "have them answer meanwhile; say 0"
            )
        return self

    @model_validator(mode="after")
    def _lengths_agree(self) -> RolloutConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens ({self.max_tokens})")
        return self
