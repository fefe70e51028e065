"""`rayloom k8s render`: a RayJob, and the ConfigMap that holds its job file, from the same job file as everywhere.

What all jobs of a namespace share (claim, account, network policy) is `k8s/base`, applied once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job
from rayloom.errors import RequestError
from rayloom.jobs.local_head import STOP_WAIT
from rayloom.jobs.metadata import job_metadata
from rayloom.k8s.documents import Document
from rayloom.k8s.overlay import Overlay
from rayloom.k8s.placed_job import place
from rayloom.stages.ppo_config import PpoConfig

_LONGEST_NAME = 47
_GRACE_SECONDS = 600
_LEAVE_SECONDS = 540  # of them; the rest is for the processes to end
_USER = 1000
_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}


@dataclass(frozen=True)
class Places:
    """Where things are in the pods."""

    root: str = "/opt/rayloom"
    """The image's checkout: relative paths of the job are taken from here."""
    storage: str = "/shared"
    """Where the claim is mounted: runs, caches."""
    claim: str = "rayloom-shared"
    """The ReadWriteMany claim."""
    job: str = "/etc/rayloom/job"
    """Where the ConfigMap with the job file is mounted."""


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
    name = _name(name or job.name)
    placed = place(job, root=places.root, storage=places.storage, gpus=overlay.gpus)
    labels = {"app.kubernetes.io/name": "rayloom", "app.kubernetes.io/instance": name}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": labels},
        "data": {"job.yaml": dump_job(placed)},
    }
    queue = {"kueue.x-k8s.io/queue-name": overlay.queue} if overlay.queue else {}
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": labels | queue},
        "spec": {
            "entrypoint": f"python -m rayloom.jobs.attempt {places.job}/job.yaml",
            "submissionMode": "K8sJobMode",
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"PYTHONUNBUFFERED": "1", **STOP_WAIT}}),
            "metadata": job_metadata(placed),
            "backoffLimit": overlay.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 3600,
            "submitterPodTemplate": _submitter(overlay, labels),
            "rayClusterSpec": _cluster(placed, overlay, places, labels, name),
        },
    }
    return [Document(f"{name}.yaml", number, body) for number, body in enumerate((config_map, ray_job), 1)]


def dump(documents: list[Document]) -> str:
    """The documents as one YAML text."""
    return "---\n".join(yaml.dump(d.body, Dumper=_Plain, sort_keys=False, width=120) for d in documents)


class _Plain(yaml.SafeDumper):
    """Texts of several lines as blocks, and no anchors: kubectl reads both, people only one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _text)


def _name(name: str) -> str:
    clean = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    clean = clean if clean[:1].isalpha() else f"job-{clean}"
    if len(clean) > _LONGEST_NAME:
        raise RequestError(
            f"name: {clean} has {len(clean)} characters and a RayJob may have {_LONGEST_NAME}; "
            "give a shorter one by --name"
        )
    return clean


def _cluster(
    job: JobConfig, overlay: Overlay, places: Places, labels: dict[str, str], config_map: str
) -> dict[str, Any]:
    train = job.train
    # Kueue admits a job as a whole; it does not follow an autoscaler.
    is_elastic = train.min_workers is not None and train.min_workers < train.workers and not overlay.queue
    least = train.possible_workers[-1] if is_elastic else train.workers
    # One more CPU for the tasks that read and tokenize.
    cpus, gpus = math.ceil(train.cpus_per_worker) + 1, int(overlay.gpus)
    groups = [_group("train", least, train.workers, _resources(cpus, overlay.worker_memory, gpus))]
    if isinstance(job.stage, PpoConfig):
        rollout = job.rollout
        gpus = rollout.tensor_parallel if overlay.gpus else 0
        resources = _resources(math.ceil(rollout.cpus_per_engine), overlay.engine_memory, gpus)
        groups.append(_group("engines", rollout.engines, rollout.engines, resources))
    for group in groups:
        group["template"] = _template(group.pop("resources"), overlay, places, labels, config_map, head=False)
    head = _resources(overlay.head_cpus, overlay.head_memory, 0)
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        **(_autoscaler() if is_elastic else {}),
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": _template(head, overlay, places, labels, config_map, head=True),
        },
        "workerGroupSpecs": groups,
    }


def _group(name: str, least: int, most: int, resources: dict[str, Any]) -> dict[str, Any]:
    return {
        "groupName": name,
        "replicas": most,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {},
        "resources": resources,
    }


def _autoscaler() -> dict[str, Any]:
    return {
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": 300,
            "resources": _resources(1, "1Gi", 0),
            "securityContext": _container_security(),
        },
    }


def _resources(cpus: int, memory: str, gpus: int) -> dict[str, Any]:
    amounts = {"cpu": str(cpus), "memory": memory} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _template(
    resources: dict[str, Any], overlay: Overlay, places: Places, labels: dict[str, str], config_map: str, *, head: bool
) -> dict[str, Any]:
    cache = f"{places.storage}/cache"
    container: dict[str, Any] = {
        "name": "ray-head" if head else "ray-worker",
        "image": overlay.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": "XDG_CACHE_HOME", "value": cache}, {"name": "HF_HOME", "value": f"{cache}/huggingface"}],
        "resources": resources,
        "securityContext": _container_security(),
        "volumeMounts": [
            {"name": "shared", "mountPath": places.storage},
            {"name": "job", "mountPath": places.job, "readOnly": True},
            {"name": "ray-files", "mountPath": "/tmp/ray"},
        ],
    }
    if head:
        container["ports"] = [{"name": name, "containerPort": port} for name, port in _PORTS.items()]
    else:
        container["ports"] = [{"name": "metrics", "containerPort": _PORTS["metrics"]}]
        command = ["python", "-m", "rayloom.k8s.leave", "--seconds", str(_LEAVE_SECONDS)]
        container["lifecycle"] = {"preStop": {"exec": {"command": command}}}
    return {
        "metadata": {"labels": labels},
        "spec": {
            "serviceAccountName": "rayloom",
            "terminationGracePeriodSeconds": _GRACE_SECONDS,
            "securityContext": _pod_security(),
            "containers": [container],
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": places.claim}},
                {"name": "job", "configMap": {"name": config_map}},
                {"name": "ray-files", "emptyDir": {"sizeLimit": "20Gi"}},
            ],
        },
    }


def _submitter(overlay: Overlay, labels: dict[str, str]) -> dict[str, Any]:
    return {
        "metadata": {"labels": labels},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": "rayloom",
            "securityContext": _pod_security(),
            "containers": [
                {
                    "name": "ray-job-submitter",
                    "image": overlay.image,
                    "imagePullPolicy": "IfNotPresent",
                    "resources": _resources(1, "1Gi", 0),
                    "securityContext": _container_security(),
                }
            ],
        },
    }


def _pod_security() -> dict[str, Any]:
    ids = {"runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER}
    return {"runAsNonRoot": True, **ids, "seccompProfile": {"type": "RuntimeDefault"}}


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
