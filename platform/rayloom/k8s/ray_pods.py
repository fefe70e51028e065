"""Ray clusters of Kubernetes, alike for every manifest: the pods' user, limits, ports and mounts, and the ConfigMap
that they read the job file from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import yaml

from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job
from rayloom.errors import RequestError
from rayloom.k8s.documents import Document
from rayloom.k8s.overlay import Overlay

GRACE_SECONDS = 600
"""That a pod has to end."""
_LONGEST_NAME = 47
_USER = 1000
_HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}


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


@dataclass(frozen=True)
class RayPods:
    """The pods of one manifest's cluster."""

    name: str
    """Of the manifest and of the ConfigMap with its job file."""
    overlay: Overlay
    places: Places
    part: str | None = None
    """`app.kubernetes.io/component` of the pods, for policies that are for some of them only."""
    ports: dict[str, int] = field(default_factory=dict)
    """That every pod has beside Ray's own."""
    calls_kubernetes: bool = True
    """Whether the pods get the account's token, as the autoscaler must."""

    @property
    def labels(self) -> dict[str, str]:
        """Of all that belongs to the manifest."""
        own = {"app.kubernetes.io/name": "rayloom", "app.kubernetes.io/instance": self.name}
        return own | ({"app.kubernetes.io/component": self.part} if self.part else {})

    def config_map(self, placed: JobConfig) -> dict[str, Any]:
        """What holds the job file."""
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": self.name, "labels": self.labels},
            "data": {"job.yaml": dump_job(placed)},
        }

    def cluster(self, groups: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The specification of a RayCluster whose head runs no work."""
        head = resources(self.overlay.head_cpus, self.overlay.head_memory)
        return {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},
            **more,
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0"},
                "template": self._template("ray-head", head, _HEAD_PORTS),
            },
            "workerGroupSpecs": list(groups),
        }

    def workers(
        self, name: str, least: int, most: int, amounts: dict[str, Any], *, pre_stop: Sequence[str] = ()
    ) -> dict[str, Any]:
        """A group of `least` to `most` worker pods.

        Args:
            amounts: `resources` of each.
            pre_stop: the command that a pod runs when it is to end, before its processes are told.
        """
        template = self._template("ray-worker", amounts, {"metrics": _HEAD_PORTS["metrics"]})
        if pre_stop:
            (container,) = template["spec"]["containers"]
            container["lifecycle"] = {"preStop": {"exec": {"command": list(pre_stop)}}}
        return {
            "groupName": name,
            "replicas": most,
            "minReplicas": least,
            "maxReplicas": most,
            "rayStartParams": {},
            "template": template,
        }

    def _template(self, name: str, amounts: dict[str, Any], ports: dict[str, int]) -> dict[str, Any]:
        cache = f"{self.places.storage}/cache"
        container: dict[str, Any] = {
            "name": name,
            "image": self.overlay.image,
            "imagePullPolicy": "IfNotPresent",
            "env": [{"name": "XDG_CACHE_HOME", "value": cache}, {"name": "HF_HOME", "value": f"{cache}/huggingface"}],
            "resources": amounts,
            "securityContext": container_security(),
            "volumeMounts": [
                {"name": "shared", "mountPath": self.places.storage},
                {"name": "job", "mountPath": self.places.job, "readOnly": True},
                {"name": "ray-files", "mountPath": "/tmp/ray"},
            ],
            "ports": [{"name": port, "containerPort": number} for port, number in (ports | self.ports).items()],
        }
        return {
            "metadata": {"labels": self.labels},
            "spec": {
                "serviceAccountName": "rayloom",
                **({} if self.calls_kubernetes else {"automountServiceAccountToken": False}),
                "terminationGracePeriodSeconds": GRACE_SECONDS,
                "securityContext": pod_security(),
                "containers": [container],
                "volumes": [
                    {"name": "shared", "persistentVolumeClaim": {"claimName": self.places.claim}},
                    {"name": "job", "configMap": {"name": self.name}},
                    {"name": "ray-files", "emptyDir": {"sizeLimit": "20Gi"}},
                ],
            },
        }


def kubernetes_name(name: str) -> str:
    """A job's name in Kubernetes' letters.

    Raises:
        RequestError: it is too long.
    """
    clean = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    clean = clean if clean[:1].isalpha() else f"job-{clean}"
    if len(clean) > _LONGEST_NAME:
        raise RequestError(
            f"name: {clean} has {len(clean)} characters and a manifest of Ray may have {_LONGEST_NAME}; "
            "give a shorter one by --name"
        )
    return clean


def resources(cpus: int, memory: str, gpus: int = 0) -> dict[str, Any]:
    """What a container asks for, which is also all that it may take."""
    amounts = {"cpu": str(cpus), "memory": memory} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {"requests": dict(amounts), "limits": dict(amounts)}


def pod_security() -> dict[str, Any]:
    """What pod security `restricted` asks of a pod."""
    ids = {"runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER}
    return {"runAsNonRoot": True, **ids, "seccompProfile": {"type": "RuntimeDefault"}}


def container_security() -> dict[str, Any]:
    """What it asks of a container."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def dump(documents: Sequence[Document]) -> str:
    """The documents as one YAML text."""
    return "---\n".join(yaml.dump(d.body, Dumper=_Plain, sort_keys=False, width=120) for d in documents)


class _Plain(yaml.SafeDumper):
    """Texts of several lines as blocks, and no anchors: kubectl reads both, people only one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _text)
