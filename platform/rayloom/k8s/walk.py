"""What rules look at: the clusters, pods and containers of a manifest, with the path of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rayloom.k8s.documents import Document


@dataclass(frozen=True)
class Group:
    """The head group or a worker group of a RayCluster."""

    path: str
    body: dict[str, Any]

    @property
    def is_head(self) -> bool:
        return self.path.endswith("headGroupSpec")


@dataclass(frozen=True)
class Pod:
    """A pod's specification."""

    path: str
    spec: dict[str, Any]
    role: str
    """`head`, `worker` or `submitter`."""

    def containers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(path, container), init containers included."""
        for field in ("containers", "initContainers"):
            for index, container in enumerate(self.spec.get(field) or ()):
                yield f"{self.path}.{field}[{index}]", container


def cluster_spec(document: Document) -> tuple[str, dict[str, Any]] | None:
    """(path, specification) of the RayCluster that the document is or makes."""
    spec = document.body.get("spec") or {}
    if document.kind == "RayCluster":
        return "spec", spec
    field = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(document.kind, "")
    if spec.get(field):
        return f"spec.{field}", spec[field]
    return None


def groups(path: str, cluster: dict[str, Any]) -> Iterator[Group]:
    """The head group, then the worker groups."""
    yield Group(f"{path}.headGroupSpec", cluster.get("headGroupSpec") or {})
    for index, body in enumerate(cluster.get("workerGroupSpecs") or ()):
        yield Group(f"{path}.workerGroupSpecs[{index}]", body)


def pods(document: Document) -> Iterator[Pod]:
    """Every pod that KubeRay's operator makes of the document, and a CronJob's."""
    if found := cluster_spec(document):
        for group in groups(*found):
            spec = (group.body.get("template") or {}).get("spec") or {}
            yield Pod(f"{group.path}.template.spec", spec, "head" if group.is_head else "worker")
    if document.kind == "CronJob":
        template = ((document.body.get("spec") or {}).get("jobTemplate") or {}).get("spec", {}).get("template") or {}
        yield Pod("spec.jobTemplate.spec.template.spec", template.get("spec") or {}, "submitter")
    submitter = ((document.body.get("spec") or {}).get("submitterPodTemplate") or {}).get("spec")
    if document.kind == "RayJob" and submitter:
        yield Pod("spec.submitterPodTemplate.spec", submitter, "submitter")
