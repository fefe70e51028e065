"""The Ray Serve application of a job's model: OpenAI's API, by Ray Serve's own `ray.serve.llm` and vLLM.

    serve run rayloom.serve.app:build job=jobs/demo.yaml

    job file -> the model it has trained (`whole_model`, on a worker) -> `build_openai_app` -> replicas

On Kubernetes a RayService names the same function (`rayloom.k8s.service`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from rayloom.config.job import JobConfig
from rayloom.config.part import ConfigPart
from rayloom.config.read import read_job
from rayloom.errors import JobError, RequestError
from rayloom.export.merge import whole_model
from rayloom.models.config import ModelConfig
from rayloom.models.precision import choose_precision, computes_bf16, engine_precision
from rayloom.models.source import raw_config
from rayloom.rollout.offline import cluster_gpus
from rayloom.rollout.vllm_engine import VLLM_TYPES, check_vllm

_MERGE_SECONDS = 3600


class ServeArguments(ConfigPart):
    """What the application is told."""

    job: str
    """The job's file."""
    min_replicas: int = Field(default=1, ge=1)
    """Engines that are always there."""
    max_replicas: int = Field(default=1, ge=1)
    """Engines when many ask. Numbers may be texts: `serve run` knows no others."""


def build(arguments: dict[str, Any]) -> Any:
    """The application; Ray Serve calls it, with what `serve run` or `serveConfigV2` says.

    Args:
        arguments: `ServeArguments`.

    Raises:
        RequestError: an argument that is not known, no such job, one that has not finished or that no engine serves.
    """
    try:
        told = ServeArguments.model_validate(arguments)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise RequestError(f"arguments of the application: {'; '.join(faults)}") from None
    job = read_job(told.job)
    if job.stage.type == "reward":
        raise RequestError(f"stage.type: reward: {job.name} has trained a model that judges answers, and writes none")
    check_vllm()
    import ray
    from ray.serve.llm import build_openai_app

    # Not here: this may be the head, which has no room for a model.
    merging = ray.remote(num_cpus=1, max_retries=0)(whole_model).remote(_absolute(job))
    try:
        folder = ray.get(merging, timeout=_MERGE_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise JobError(
            f"the application waited {_MERGE_SECONDS} s for a worker to merge the adapter of {job.name}, which takes a "
            "CPU that nothing else has reserved, and memory for the model in fp32"
        ) from None
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, RequestError) else error from None
    device: Literal["cpu", "gpu"] = "gpu" if job.train.device != "cpu" and cluster_gpus() else "cpu"
    return build_openai_app({"llm_configs": [engine_settings(job, told, folder, device)]})


def _absolute(job: JobConfig) -> JobConfig:
    """The job with its folders seen from here: a worker has another current directory."""
    changes: dict[str, Any] = {}
    if job.output_folder is not None:
        changes["output_dir"] = str(job.output_folder)
    folder = Path(job.model.path).expanduser()
    if folder.is_dir():
        changes["model"] = job.model.model_copy(update={"path": str(folder.absolute())})
    return job.model_copy(update=changes)


def engine_settings(
    job: JobConfig, told: ServeArguments, folder: Path, device: Literal["cpu", "gpu"]
) -> dict[str, Any]:
    """The `LLMConfig` of `ray.serve.llm`, by the job's `rollout`.

    Args:
        folder: of the whole weights.
        device: that the engines compute on.
    """
    rollout = job.rollout
    limit = raw_config(ModelConfig(path=str(folder))).get("max_position_embeddings")
    length = job.data.cutoff + rollout.max_tokens
    own = choose_precision(rollout.precision, device, bf16=device == "gpu" or computes_bf16("cpu"))
    engine: dict[str, Any] = {
        "dtype": VLLM_TYPES[engine_precision(rollout.precision, own, device)],
        "max_model_len": min(length, limit) if limit else length,
        "enable_prefix_caching": True,
        "trust_remote_code": job.model.trust_remote_code,
    }
    variables = {"VLLM_NO_USAGE_STATS": "1"}
    settings: dict[str, Any] = {}
    if device == "cpu":
        engine |= {"enforce_eager": True, "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30)}
        cpus = math.ceil(rollout.cpus_per_engine)
        settings["accelerator_config"] = {"kind": "cpu"}
        settings["placement_group_config"] = {"bundles": [{"CPU": cpus}]}
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(cpus)}
    else:
        engine |= {"gpu_memory_utilization": rollout.gpu_memory, "tensor_parallel_size": rollout.tensor_parallel}
    replicas = {"min_replicas": told.min_replicas, "max_replicas": max(told.min_replicas, told.max_replicas)}
    return {
        "model_loading_config": {"model_id": job.name, "model_source": str(folder)},
        # The engine's work is counted by its bundle.
        "deployment_config": {"autoscaling_config": replicas, "ray_actor_options": {"num_cpus": 0}},
        "engine_kwargs": engine,
        "runtime_env": {"env_vars": variables},
        **settings,
    }
