"""The engines of a job of stage ppo: what they are started with, and what they take from the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.config import LoraConfig
from rayloom.models.precision import Precision, engine_precision
from rayloom.rollout.fleet import FleetClient, start_fleet
from rayloom.rollout.request import probe_prompt
from rayloom.rollout.vllm_engine import EngineOptions


def engine_bundles(job: JobConfig, device: str) -> list[dict[str, float]]:
    """What each engine takes from the cluster; none for other stages than ppo."""
    if job.stage.type != "ppo":
        return []
    gpus = {"GPU": job.rollout.gpus_per_engine} if device == "gpu" else {}
    return [{"CPU": job.rollout.cpus_per_engine, **gpus}] * job.rollout.engines


@contextmanager
def engines_of(job: JobConfig, device: str, precision: Precision, first: pa.Table) -> Iterator[FleetClient | None]:
    """The job's engines, as long as it runs; None for other stages than ppo.

    Args:
        precision: what the trainer computes in.
        first: prompts of the stream; one of them is what probes answer.

    Raises:
        RequestError: the cluster has no room for them, or no GPUs for their `tensor_parallel`.
        JobError: one did not start.
    """
    if job.stage.type != "ppo":
        yield None
        return
    if device == "cpu" and job.rollout.tensor_parallel > 1:  # `train.device: auto` may have asked for more
        raise RequestError(
            f"rollout.tensor_parallel: {job.rollout.tensor_parallel} is for GPUs, and the cluster has none; say 1"
        )
    options = EngineOptions(
        model=job.model.path,
        precision=engine_precision(job.rollout.precision, precision, device),
        max_length=job.data.cutoff + job.rollout.max_tokens,
        adapter_rank=_rank(job),
        device="gpu" if device == "gpu" else "cpu",
        tensor_parallel=job.rollout.tensor_parallel,
        kv_cache_gib=job.rollout.kv_cache_gib,
        gpu_memory=job.rollout.gpu_memory,
        sleeps=device == "gpu" and job.rollout.share_gpus,
        trust_remote_code=job.model.trust_remote_code,
        revision=job.model.revision,
        seed=job.train.seed,
    )
    prompt = next(tuple(ids) for ids in first["input_ids"].to_pylist() if ids)
    client = start_fleet(job.rollout, options, probe_prompt(prompt))
    try:
        yield client
    finally:
        client.stop()


def _rank(job: JobConfig) -> int | None:
    """Of the policy's adapter; None: there is none."""
    method = job.method
    if not isinstance(method, LoraConfig):
        return None
    if not method.continues:
        return method.rank
    from rayloom.methods.adapter_folder import read_adapter_config

    return int(read_adapter_config(method.adapters[-1], "method.adapters").r)
