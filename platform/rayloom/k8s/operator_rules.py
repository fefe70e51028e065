"""What the KubeRay operator refuses, and the CRDs' CEL rules: all that a schema cannot say.

The API server takes such a manifest and the job then stands still with `ValidationFailed`; here it is said before.
Ported from KubeRay v1.7.0 (`ray-operator/controllers/ray/utils/validation.go`), for RayCluster, RayJob and
RayService.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version

from rayloom.k8s.documents import Document, Fault
from rayloom.k8s.walk import Group, cluster_spec, groups

_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
_LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
_UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
_GATED = {
    "networkPolicy": "RayClusterNetworkPolicy; ship a NetworkPolicy object",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
_START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_REDIS = ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD")


def operator_faults(document: Document) -> Iterator[Fault]:
    """What the operator would refuse of a RayCluster, RayJob or RayService whose fields fit its schema."""
    if document.kind not in _LONGEST_NAME:
        return
    longest = _LONGEST_NAME[document.kind]
    if len(document.name) > longest:
        yield "metadata.name", f"has {len(document.name)} characters; a {document.kind} may have {longest}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", document.name):
        yield "metadata.name", f"{document.name}: lower-case letters, digits and dashes, a letter first"
    if document.kind == "RayJob":
        yield from _job(document.body.get("spec") or {})
    if document.kind == "RayService":
        yield from _service(document.body.get("spec") or {})
    if found := cluster_spec(document):
        yield from _cluster(*found, kind=document.kind)


def _job(spec: dict[str, Any]) -> Iterator[Fault]:
    mode = spec.get("submissionMode", "K8sJobMode")
    retries = spec.get("backoffLimit", 0)
    if mode not in _MODES:
        yield "spec.submissionMode", f"{mode}: must be one of {', '.join(_MODES)}"
    if bool(spec.get("rayClusterSpec")) == bool(spec.get("clusterSelector")):
        yield "spec.rayClusterSpec", "a RayJob has either rayClusterSpec or clusterSelector"
    if not spec.get("entrypoint") and mode != "InteractiveMode":
        yield "spec.entrypoint", "is missing: the command that the job runs"
    if not spec.get("shutdownAfterJobFinishes"):
        if spec.get("ttlSecondsAfterFinished"):
            yield "spec.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true"
        if spec.get("suspend"):
            yield "spec.suspend", "needs shutdownAfterJobFinishes: true"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "spec.ttlSecondsAfterFinished", "must be 0 or above"
    if retries < 0:
        yield "spec.backoffLimit", f"{retries}: must be 0 or above"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field) is not None and spec[field] <= 0:
            yield f"spec.{field}", f"{spec[field]}: must be above 0"
    if spec.get("clusterSelector"):
        if retries > 0:
            yield "spec.backoffLimit", "a retry makes a new cluster, which clusterSelector excludes"
        if spec.get("suspend"):
            yield "spec.suspend", "a cluster that clusterSelector chose is not the job's to suspend"
    if mode == "InteractiveMode" and retries > 0:
        yield "spec.backoffLimit", "InteractiveMode does not retry: must be 0"
    if mode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if spec.get(field):
                yield f"spec.{field}", "SidecarMode submits from the head's pod: leave it out"
    yield from _runtime_env(spec.get("runtimeEnvYAML"))
    yield from _managed_by("spec", spec)
    yield from _deletion(spec)


def _service(spec: dict[str, Any]) -> Iterator[Fault]:
    if not spec.get("rayClusterConfig"):
        yield "spec.rayClusterConfig", "is missing: the cluster that serves"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "spec.rayClusterDeletionDelaySeconds", "must be 0 or above"
    cluster = spec.get("rayClusterConfig") or {}
    head_service = (cluster.get("headGroupSpec") or {}).get("headService") or {}
    if (head_service.get("metadata") or {}).get("name"):
        yield "spec.rayClusterConfig.headGroupSpec.headService.metadata.name", "leave it out: the operator names it"
    upgrade = spec.get("upgradeStrategy") or {}
    if upgrade.get("type") not in (None, *_UPGRADES):
        yield "spec.upgradeStrategy.type", f"{upgrade['type']}: must be one of {', '.join(_UPGRADES)}"
    if upgrade.get("type") == "NewClusterWithIncrementalUpgrade":
        if not cluster.get("enableInTreeAutoscaling"):
            yield "spec.rayClusterConfig.enableInTreeAutoscaling", "an incremental upgrade needs the autoscaler"
        if not upgrade.get("clusterUpgradeOptions"):
            yield "spec.upgradeStrategy.clusterUpgradeOptions", "is missing: an incremental upgrade goes by it"
    yield from _managed_by("spec", spec)
    try:
        applications = (yaml.safe_load(spec.get("serveConfigV2") or "") or {}).get("applications")
    except (yaml.YAMLError, AttributeError):
        yield "spec.serveConfigV2", "must be YAML with a list `applications`"
        return
    if not isinstance(applications, list) or not applications:
        yield "spec.serveConfigV2", "names no applications: the cluster would serve nothing"
        return
    for index, application in enumerate(applications):
        if not isinstance(application, dict) or not isinstance(application.get("import_path"), str):
            yield "spec.serveConfigV2", f"applications[{index}].import_path is missing: MODULE:FUNCTION"


def _runtime_env(text: str | None) -> Iterator[Fault]:
    if not text:
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield "spec.runtimeEnvYAML", f"is no YAML: {getattr(error, 'problem', error)}"
        return
    if not isinstance(value, dict):
        yield "spec.runtimeEnvYAML", f"must be a mapping such as `env_vars: {{...}}`, not {type(value).__name__}"


def _managed_by(path: str, spec: dict[str, Any]) -> Iterator[Fault]:
    if spec.get("managedBy") not in (None, *_MANAGERS):
        yield f"{path}.managedBy", f"{spec['managedBy']}: must be {' or '.join(_MANAGERS)}"


def _deletion(spec: dict[str, Any]) -> Iterator[Fault]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    path = "spec.deletionStrategy"
    legacy = [field for field in ("onSuccess", "onFailure") if field in strategy]
    rules = strategy.get("deletionRules") or []
    if legacy and rules:
        yield path, "onSuccess and onFailure do not go with deletionRules"
    elif len(legacy) != 2 and not rules:
        yield path, "needs deletionRules, or both onSuccess and onFailure"
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield path, "deletionRules exclude shutdownAfterJobFinishes"
    if rules and spec.get("ttlSecondsAfterFinished"):
        yield path, "deletionRules exclude ttlSecondsAfterFinished; each rule has its own ttlSeconds"
    for index, rule in enumerate(rules):
        condition = rule.get("condition") or {}
        if ("jobStatus" in condition) == ("jobDeploymentStatus" in condition):
            yield f"{path}.deletionRules[{index}].condition", "needs either jobStatus or jobDeploymentStatus"


def _cluster(path: str, cluster: dict[str, Any], *, kind: str) -> Iterator[Fault]:
    for field, gate in _GATED.items():
        if cluster.get(field):
            yield f"{path}.{field}", f"the operator refuses it unless its feature gate is on: {gate}"
    yield from _managed_by(path, cluster)
    yield from _auth(path, cluster, kind=kind)
    names = [str(group.get("groupName")) for group in cluster.get("workerGroupSpecs") or ()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{path}.workerGroupSpecs", f"two groups are called {name}"
    options = cluster.get("autoscalerOptions") or {}
    version = _version(cluster)
    # Version 2 is what a cluster gets that does not say, from Ray 2.47 on.
    is_v2 = options.get("version", "v2" if version is None or version >= Version("2.47") else "v1") == "v2"
    for group in groups(path, cluster):
        yield from _group(group, options)
        restart = ((group.body.get("template") or {}).get("spec") or {}).get("restartPolicy")
        if cluster.get("enableInTreeAutoscaling") and is_v2 and restart not in (None, "Never"):
            yield f"{group.path}.template.spec.restartPolicy", f"{restart}: autoscaler v2 wants Never, or nothing"
        environment = [
            (f"{group.path}.template.spec.containers[{index}].env", item.get("name"))
            for index, container in enumerate(
                ((group.body.get("template") or {}).get("spec") or {}).get("containers") or ()
            )
            for item in container.get("env") or ()
        ]
        for place, name in environment:
            if cluster.get("gcsFaultToleranceOptions") and name in _REDIS:
                yield place, f"{name} does not go with gcsFaultToleranceOptions, which sets it"


def _auth(path: str, cluster: dict[str, Any], *, kind: str) -> Iterator[Fault]:
    auth = cluster.get("authOptions") or {}
    version = _version(cluster)
    if cluster.get("rayVersion") and version is None:
        yield f"{path}.rayVersion", f"{cluster['rayVersion']}: must be a version such as 2.60.0"
    if auth.get("mode") == "token" and (version is None or version < Version("2.52")):
        yield f"{path}.rayVersion", "authOptions.mode token needs rayVersion 2.52 or newer"
    if auth.get("enableK8sTokenAuth") and kind != "RayCluster":
        yield f"{path}.authOptions.enableK8sTokenAuth", f"is not for a {kind}"


def _group(group: Group, options: dict[str, Any]) -> Iterator[Fault]:
    body, path = group.body, group.path
    start = body.get("rayStartParams") or {}
    if not ((body.get("template") or {}).get("spec") or {}).get("containers"):
        yield f"{path}.template.spec.containers", "is empty; the first one runs Ray"
    if body.get("resources") and (both := [name for name in _START_RESOURCES if name in start]):
        yield f"{path}.resources", f"rayStartParams has {', '.join(both)} already; say it in one place"
    if "labels" in start:
        yield f"{path}.rayStartParams.labels", "use the group's own labels"
    if group.is_head:
        return
    least, most = body.get("minReplicas", 0), body.get("maxReplicas", 2**31 - 1)
    if least > most:
        yield f"{path}.minReplicas", f"{least} is more than maxReplicas ({most})"
    if not least <= body.get("replicas", least) <= most:
        yield f"{path}.replicas", f"{body['replicas']}: must be between minReplicas ({least}) and maxReplicas ({most})"
    if body.get("idleTimeoutSeconds") is not None and options.get("version") != "v2":
        yield f"{path}.idleTimeoutSeconds", "needs autoscalerOptions.version v2"


def _version(cluster: dict[str, Any]) -> Version | None:
    try:
        return Version(str(cluster.get("rayVersion")))
    except InvalidVersion:
        return None
