"""`rayloom k8s render`: a RayJob, and the ConfigMap that holds its job file, from the same job file as everywhere.

What all jobs of a namespace share (claim, account, network policy) is `k8s/base`, applied once.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

from rayloom.config.job import JobConfig
from rayloom.jobs.local_head import STOP_WAIT
from rayloom.jobs.metadata import job_metadata
from rayloom.k8s.documents import Document
from rayloom.k8s.overlay import Overlay
from rayloom.k8s.placed_job import place
from rayloom.k8s.ray_pods import (
    GRACE_SECONDS,
    Places,
    RayPods,
    container_security,
    kubernetes_name,
    pod_security,
    resources,
)
from rayloom.stages.ppo_config import PpoConfig

_LEAVE = ("python", "-m", "rayloom.k8s.leave", "--seconds", str(GRACE_SECONDS - 60))  # the rest: to end processes


def render(
    job: JobConfig, overlay: Overlay, places: Places | None = None, *, name: str | None = None
) -> list[Document]:
    """The ConfigMap and the RayJob of a job.

    Args:
        name: of both; by default the job's name, in Kubernetes' letters.

    Raises:
        RequestError: a name or a path that Kubernetes cannot have, or a device that the overlay has not got.
    """
    places = places or Places()
    pods = RayPods(kubernetes_name(name or job.name), overlay, places)
    placed = place(job, root=places.root, storage=places.storage, gpus=overlay.gpus)
    queue = {"kueue.x-k8s.io/queue-name": overlay.queue} if overlay.queue else {}
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": pods.name, "labels": pods.labels | queue},
        "spec": {
            "entrypoint": f"python -m rayloom.jobs.attempt {places.job}/job.yaml",
            "submissionMode": "K8sJobMode",
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"PYTHONUNBUFFERED": "1", **STOP_WAIT}}),
            "metadata": job_metadata(placed),
            "backoffLimit": overlay.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 3600,
            "submitterPodTemplate": _submitter(pods),
            "rayClusterSpec": _cluster(placed, pods),
        },
    }
    bodies = (pods.config_map(placed), ray_job)
    return [Document(f"{pods.name}.yaml", number, body) for number, body in enumerate(bodies, 1)]


def _cluster(job: JobConfig, pods: RayPods) -> dict[str, Any]:
    train, overlay = job.train, pods.overlay
    # Kueue admits a job as a whole; it does not follow an autoscaler.
    is_elastic = train.min_workers is not None and train.min_workers < train.workers and not overlay.queue
    least = train.possible_workers[-1] if is_elastic else train.workers
    engines = job.rollout if isinstance(job.stage, PpoConfig) else None
    beside = engines if engines is not None and engines.share_gpus else None  # in the workers' pods
    # One more CPU for the tasks that read and tokenize.
    cpus = math.ceil(train.cpus_per_worker + (beside.cpus_per_engine if beside else 0)) + 1
    memory = _sum(overlay.worker_memory, overlay.engine_memory) if beside else overlay.worker_memory
    amounts = resources(cpus, memory, int(overlay.gpus))
    groups = [pods.workers("train", least, train.workers, amounts, pre_stop=_LEAVE)]
    if engines is not None and beside is None:
        gpus = engines.tensor_parallel if overlay.gpus else 0
        amounts = resources(math.ceil(engines.cpus_per_engine), overlay.engine_memory, gpus)
        groups.append(pods.workers("engines", engines.engines, engines.engines, amounts, pre_stop=_LEAVE))
    return pods.cluster(groups, **(_autoscaler() if is_elastic else {}))


def _sum(one: str, other: str) -> str:
    """Of two amounts of memory in Gi."""
    return f"{int(one.removesuffix('Gi')) + int(other.removesuffix('Gi'))}Gi"


def _autoscaler() -> dict[str, Any]:
    return {
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": 300,
            "resources": resources(1, "1Gi"),
            "securityContext": container_security(),
        },
    }


def _submitter(pods: RayPods) -> dict[str, Any]:
    return {
        "metadata": {"labels": pods.labels},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": "rayloom",
            "securityContext": pod_security(),
            "containers": [
                {
                    "name": "ray-job-submitter",
                    "image": pods.overlay.image,
                    "imagePullPolicy": "IfNotPresent",
                    "resources": resources(1, "1Gi"),
                    "securityContext": container_security(),
                }
            ],
        },
    }
