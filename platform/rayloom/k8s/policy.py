"""What Rayloom asks of a manifest beyond what a cluster would take: pods that are safe, bounded and repeatable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from rayloom.k8s.documents import Document, Fault
from rayloom.k8s.walk import Pod, cluster_spec, groups, pods

GRACE_SECONDS = 120
"""The least that a worker's pod needs between the notice and its end, to save a checkpoint."""
_GPU = "nvidia.com/gpu"
_HOST = ("hostNetwork", "hostPID", "hostIPC")


def policy_faults(document: Document) -> Iterator[Fault]:
    """What a RayCluster, RayJob or RayService has against our policy."""
    for pod in pods(document):
        yield from _pod(pod)
    if found := cluster_spec(document):
        yield from _cluster(*found)
    if document.kind == "RayJob":
        spec, labels = document.body.get("spec") or {}, document.body["metadata"].get("labels") or {}
        if not spec.get("shutdownAfterJobFinishes") and spec.get("rayClusterSpec"):
            why = (
                "Kueue admits no other" if "kueue.x-k8s.io/queue-name" in labels else "else its machines stay for ever"
            )
            yield "spec.shutdownAfterJobFinishes", f"must be true: {why}"


def reference_faults(documents: Sequence[Document]) -> Iterator[tuple[Document, Fault]]:
    """Claims, ConfigMaps and accounts that pods name and no document is, where the documents have any of that kind."""
    names = {kind: {d.name for d in documents if d.kind == kind} for kind in _REFERENCES.values()}
    for document in documents:
        for pod in pods(document):
            for path, kind, name in _references(pod):
                if names[kind] and name not in names[kind]:
                    there = ", ".join(sorted(names[kind]))
                    yield document, (path, f"there is no {kind} {name} among these manifests; there are {there}")


_REFERENCES = {"claimName": "PersistentVolumeClaim", "name": "ConfigMap", "serviceAccountName": "ServiceAccount"}


def _references(pod: Pod) -> Iterator[tuple[str, str, str]]:
    if account := pod.spec.get("serviceAccountName"):
        yield f"{pod.path}.serviceAccountName", "ServiceAccount", account
    for index, volume in enumerate(pod.spec.get("volumes") or ()):
        for source, key in (("persistentVolumeClaim", "claimName"), ("configMap", "name")):
            if source in volume:
                yield f"{pod.path}.volumes[{index}].{source}.{key}", _REFERENCES[key], volume[source].get(key, "")


# --- pods -----------------------------------------------------------------------------------------------------------


def _pod(pod: Pod) -> Iterator[Fault]:
    context = pod.spec.get("securityContext") or {}
    if context.get("runAsNonRoot") is not True:
        yield f"{pod.path}.securityContext.runAsNonRoot", "must be true"
    if (context.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield f"{pod.path}.securityContext.seccompProfile.type", "must be RuntimeDefault"
    for field in _HOST:
        if pod.spec.get(field):
            yield f"{pod.path}.{field}", "a pod under pod security `restricted` may not have it"
    volumes = [volume.get("name") for volume in pod.spec.get("volumes") or ()]
    for index, volume in enumerate(pod.spec.get("volumes") or ()):
        if "hostPath" in volume:
            yield f"{pod.path}.volumes[{index}].hostPath", "pod security `restricted` forbids it; use a claim"
    if pod.role == "worker" and pod.spec.get("terminationGracePeriodSeconds", 30) < GRACE_SECONDS:
        yield (
            f"{pod.path}.terminationGracePeriodSeconds",
            f"must be {GRACE_SECONDS} or more: time to save a checkpoint when the machine is taken away",
        )
    for path, container in pod.containers():
        yield from _image(path, container)
        yield from _security(f"{path}.securityContext", container.get("securityContext") or {})
        yield from _limits(f"{path}.resources", container.get("resources") or {})
        yield from _mounts(path, container, volumes)


def _image(path: str, container: dict[str, Any]) -> Iterator[Fault]:
    image = str(container.get("image", ""))
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        yield f"{path}.image", f"{image or 'is missing'}: name a version (not latest) or a digest"


def _security(path: str, context: dict[str, Any]) -> Iterator[Fault]:
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{path}.allowPrivilegeEscalation", "must be false"
    if "ALL" not in ((context.get("capabilities") or {}).get("drop") or ()):
        yield f"{path}.capabilities.drop", "must be [ALL]"
    if context.get("privileged"):
        yield f"{path}.privileged", "must not be true"
    if context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False:
        yield path, "must not run as root"


def _limits(path: str, resources: dict[str, Any]) -> Iterator[Fault]:
    for kind in ("requests", "limits"):
        for name in ("cpu", "memory"):
            if name not in (resources.get(kind) or {}):
                yield f"{path}.{kind}.{name}", "is missing; Ray counts by the limits, the scheduler by the requests"
    gpus = (resources.get("limits") or {}).get(_GPU)
    asked = (resources.get("requests") or {}).get(_GPU, gpus)
    if asked != gpus:
        yield f"{path}.requests.{_GPU}", f"{asked}: must equal its limit, {gpus}"


def _mounts(path: str, container: dict[str, Any], volumes: list[Any]) -> Iterator[Fault]:
    seen: set[str] = set()
    for index, mount in enumerate(container.get("volumeMounts") or ()):
        if mount.get("name") not in volumes:
            there = f"there are {', '.join(map(str, volumes))}" if volumes else "it has none"
            yield f"{path}.volumeMounts[{index}].name", f"the pod has no volume {mount.get('name')}; {there}"
        if mount.get("mountPath") in seen:
            yield f"{path}.volumeMounts[{index}].mountPath", f"{mount['mountPath']} is mounted twice"
        seen.add(str(mount.get("mountPath")))


# --- the cluster ----------------------------------------------------------------------------------------------------


def _cluster(path: str, cluster: dict[str, Any]) -> Iterator[Fault]:
    ray = version("ray")
    if cluster.get("rayVersion") != ray:
        yield (
            f"{path}.rayVersion",
            f"{cluster.get('rayVersion', 'is missing')}: must be {ray}, which Rayloom is made for",
        )
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield f"{path}.authOptions.mode", "must be token: else whoever reaches the dashboard runs code"
    head, *workers = groups(path, cluster)
    if (head.body.get("rayStartParams") or {}).get("num-cpus") != "0":
        yield f"{head.path}.rayStartParams.num-cpus", 'must be "0": the head plans, the workers compute'
    claims = _claims(head.body)
    for group in workers:
        if _claims(group.body) != claims:
            yield (
                f"{group.path}.template.spec.containers[0].volumeMounts",
                f"mounts {_listed(_claims(group.body))} and the head {_listed(claims)}; checkpoints are in one place",
            )
    if cluster.get("enableInTreeAutoscaling"):
        options, place = cluster.get("autoscalerOptions") or {}, f"{path}.autoscalerOptions"
        yield from _security(f"{place}.securityContext", options.get("securityContext") or {})
        yield from _limits(f"{place}.resources", options.get("resources") or {})


def _claims(group: dict[str, Any]) -> dict[str, str]:
    """Where the Ray container mounts which claim."""
    spec = (group.get("template") or {}).get("spec") or {}
    names = {
        volume.get("name"): volume["persistentVolumeClaim"].get("claimName")
        for volume in spec.get("volumes") or ()
        if "persistentVolumeClaim" in volume
    }
    mounts = (spec.get("containers") or [{}])[0].get("volumeMounts") or ()
    return {mount["mountPath"]: names[mount["name"]] for mount in mounts if mount.get("name") in names}


def _listed(claims: dict[str, str]) -> str:
    return ", ".join(f"{claim} at {place}" for place, claim in claims.items()) or "no claim"
