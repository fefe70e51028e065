"""Broken manifests, each a good one with one edit, and the reason for which each is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from rayloom.cli import cli
from rayloom.config.read import read_job
from rayloom.errors import RequestError
from rayloom.k8s.check import check, check_documents
from rayloom.k8s.documents import Document
from rayloom.k8s.overlay import OVERLAYS
from rayloom.k8s.ray_pods import dump
from rayloom.k8s.render import render
from rayloom.k8s.service import render_service

ROOT = Path(__file__).resolve().parents[2]
GONE = object()
STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")

CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec"
GROUP = f"{CLUSTER}.workerGroupSpecs[0]"
POD = f"{GROUP}.template.spec"
RAY = f"{POD}.containers[0]"
SUBMITTER = "spec.submitterPodTemplate.spec"


@pytest.fixture(scope="module")
def good() -> list[dict[str, Any]]:
    """The ConfigMap and the RayJob of the demo, a claim, and an account."""
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    return [document.body for document in render(read_job(ROOT / "jobs" / "demo.yaml"), OVERLAYS["cpu"])] + [
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "rayloom-shared"}, "spec": claim},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "rayloom"}},
    ]


def edited(bodies: list[dict[str, Any]], number: int, path: str, value: Any) -> list[Document]:
    """The documents with one field of one of them set, or taken away."""
    bodies = copy.deepcopy(bodies)
    steps: list[Any] = [int(index) if index else key for index, key in STEP.findall(path)]
    holder: Any = bodies[number - 1]
    for step in steps[:-1]:
        holder = holder[step] if isinstance(step, int) else holder.setdefault(step, {})
    if value is GONE:
        del holder[steps[-1]]
    else:
        holder[steps[-1]] = value
    return [Document("m.yaml", place, body) for place, body in enumerate(bodies, 1)]


def test_the_good_one_passes(good):
    check_documents([Document("m.yaml", place, body) for place, body in enumerate(good, 1)])


TWO_POLICIES = {"onSuccess": {"policy": "DeleteCluster"}, "onFailure": {"policy": "DeleteCluster"}}
RULE = {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 0}}

ONE_GPU = {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "1"}

# (edited field, its value, path of the fault, what is said)
OF_THE_JOB = [
    # what the schema says
    ("spec.entryPoint", "x", "spec.entryPoint", "KubeRay v1.7.0 knows no such field; did you mean entrypoint?"),
    (f"{RAY}.volumeMount", [], f"{RAY}.volumeMount", "did you mean volumeMounts?"),
    (f"{RAY}.resources.limit", {}, f"{RAY}.resources.limit", "did you mean limits?"),
    (f"{POD}.securityContext.runAsNonroot", True, f"{POD}.securityContext.runAsNonroot", "did you mean runAsNonRoot?"),
    ("spec.backoffLimit", "2", "spec.backoffLimit", '"2": must be of type integer'),
    ("spec.metadata", {"step": 3}, "spec.metadata.step", "3: must be of type string"),
    (f"{CLUSTER}.authOptions.mode", "tokens", f"{CLUSTER}.authOptions.mode", "must be one of disabled, token"),
    (f"{GROUP}.groupName", GONE, f"{GROUP}.groupName", "is missing"),
    (f"{RAY}.name", GONE, f"{RAY}.name", "is missing"),
    (f"{RAY}.ports[0].containerPort", "http", f"{RAY}.ports[0].containerPort", "must be of type integer"),
    ("apiVersion", "ray.io/v1alpha1", "apiVersion", "ray.io/v1alpha1: must be ray.io/v1"),
    ("kind", "RayJobs", "kind", "ray.io/v1 RayJobs is not known; of Ray there are RayCluster, RayJob"),
    ("metadata.label", {}, "metadata.label", "is not known; did you mean labels?"),
    ("metadata.name", GONE, "metadata.name", "is missing"),
    # what the operator refuses
    ("metadata.name", "a" * 48, "metadata.name", "has 48 characters; a RayJob may have 47"),
    ("metadata.name", "Demo", "metadata.name", "lower-case letters, digits and dashes"),
    ("spec.submissionMode", "K8SJobMode", "spec.submissionMode", "must be one of K8sJobMode, HTTPMode, SidecarMode"),
    ("spec.submissionMode", "InteractiveMode", "spec.backoffLimit", "InteractiveMode does not retry"),
    ("spec.submissionMode", "SidecarMode", "spec.submitterPodTemplate", "leave it out"),
    ("spec.entrypoint", GONE, "spec.entrypoint", "is missing: the command that the job runs"),
    (
        "spec.clusterSelector",
        {"ray.io/cluster": "a"},
        "spec.rayClusterSpec",
        "either rayClusterSpec or clusterSelector",
    ),
    ("spec.shutdownAfterJobFinishes", False, "spec.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true"),
    ("spec.backoffLimit", -1, "spec.backoffLimit", "-1: must be 0 or above"),
    ("spec.activeDeadlineSeconds", 0, "spec.activeDeadlineSeconds", "0: must be above 0"),
    ("spec.runtimeEnvYAML", "env_vars: {", "spec.runtimeEnvYAML", "is no YAML"),
    ("spec.runtimeEnvYAML", "env_vars", "spec.runtimeEnvYAML", "must be a mapping"),
    ("spec.managedBy", "me", "spec.managedBy", "must be ray.io/kuberay-operator or kueue"),
    ("spec.deletionStrategy", {}, "spec.deletionStrategy", "needs deletionRules, or both"),
    ("spec.deletionStrategy", {**TWO_POLICIES, "deletionRules": [RULE]}, "spec.deletionStrategy", "do not go with"),
    ("spec.deletionStrategy", {"deletionRules": [RULE]}, "spec.deletionStrategy", "exclude shutdownAfterJobFinishes"),
    (f"{CLUSTER}.rayVersion", "2.51.0", f"{CLUSTER}.rayVersion", "authOptions.mode token needs rayVersion 2.52"),
    (f"{CLUSTER}.rayVersion", "newest", f"{CLUSTER}.rayVersion", "must be a version such as 2.60.0"),
    (f"{CLUSTER}.networkPolicy", {"mode": "DenyAll"}, f"{CLUSTER}.networkPolicy", "ship a NetworkPolicy object"),
    (
        f"{CLUSTER}.authOptions.enableK8sTokenAuth",
        True,
        f"{CLUSTER}.authOptions.enableK8sTokenAuth",
        "not for a RayJob",
    ),
    (f"{GROUP}.minReplicas", 3, f"{GROUP}.minReplicas", "3 is more than maxReplicas (2)"),
    (f"{GROUP}.replicas", 5, f"{GROUP}.replicas", "must be between minReplicas (2) and maxReplicas (2)"),
    (f"{GROUP}.rayStartParams.labels", "a=b", f"{GROUP}.rayStartParams.labels", "use the group's own labels"),
    (f"{HEAD}.resources", {"CPU": "0"}, f"{HEAD}.resources", "rayStartParams has num-cpus already"),
    (f"{GROUP}.idleTimeoutSeconds", 60, f"{GROUP}.idleTimeoutSeconds", "needs autoscalerOptions.version v2"),
    (f"{POD}.containers", [], f"{POD}.containers", "the first one runs Ray"),
    # what we ask for
    (f"{RAY}.image", "rayloom", f"{RAY}.image", "name a version (not latest) or a digest"),
    (f"{RAY}.image", "host:5000/rayloom:latest", f"{RAY}.image", "name a version (not latest) or a digest"),
    (f"{RAY}.resources.limits.memory", GONE, f"{RAY}.resources.limits.memory", "is missing"),
    (f"{RAY}.resources.requests", GONE, f"{RAY}.resources.requests.cpu", "is missing"),
    (f"{RAY}.resources.requests", ONE_GPU, f"{RAY}.resources.requests.nvidia.com/gpu", "1: must equal its limit, None"),
    (f"{SUBMITTER}.containers[0].resources", GONE, f"{SUBMITTER}.containers[0].resources.limits.cpu", "is missing"),
    (f"{RAY}.volumeMounts[0].name", "share", f"{RAY}.volumeMounts[0].name", "the pod has no volume share; there are"),
    (f"{RAY}.volumeMounts[1].mountPath", "/shared", f"{RAY}.volumeMounts[1].mountPath", "/shared is mounted twice"),
    (f"{RAY}.volumeMounts[0].mountPath", "/data", f"{RAY}.volumeMounts", "rayloom-shared at /data and the head"),
    (f"{RAY}.securityContext.allowPrivilegeEscalation", True, f"{RAY}.securityContext.allowPriv", "must be false"),
    (f"{RAY}.securityContext.capabilities.drop", ["NET_RAW"], f"{RAY}.securityContext.capabilities.drop", "[ALL]"),
    (f"{RAY}.securityContext.privileged", True, f"{RAY}.securityContext.privileged", "must not be true"),
    (f"{RAY}.securityContext.runAsUser", 0, f"{RAY}.securityContext", "must not run as root"),
    (f"{POD}.securityContext.runAsNonRoot", GONE, f"{POD}.securityContext.runAsNonRoot", "must be true"),
    (f"{POD}.securityContext.seccompProfile", GONE, f"{POD}.securityContext.seccompProfile.type", "RuntimeDefault"),
    (f"{POD}.hostNetwork", True, f"{POD}.hostNetwork", "may not have it"),
    (
        f"{POD}.volumes[2]",
        {"name": "ray-files", "hostPath": {"path": "/"}},
        f"{POD}.volumes[2].hostPath",
        "use a claim",
    ),
    (f"{POD}.terminationGracePeriodSeconds", GONE, f"{POD}.terminationGracePeriodSeconds", "must be 120 or more"),
    (f"{CLUSTER}.rayVersion", "2.59.0", f"{CLUSTER}.rayVersion", "must be 2.60.0, which Rayloom is made for"),
    (f"{CLUSTER}.authOptions", GONE, f"{CLUSTER}.authOptions.mode", "must be token"),
    (f"{HEAD}.rayStartParams", {}, f"{HEAD}.rayStartParams.num-cpus", 'must be "0"'),
    (f"{CLUSTER}.enableInTreeAutoscaling", True, f"{CLUSTER}.autoscalerOptions.resources.limits.cpu", "is missing"),
    # what the others must have
    (f"{POD}.volumes[0].persistentVolumeClaim.claimName", "a", f"{POD}.volumes[0]", "no PersistentVolumeClaim a among"),
    (f"{POD}.volumes[1].configMap.name", "other", f"{POD}.volumes[1]", "no ConfigMap other among these manifests"),
    (f"{POD}.serviceAccountName", "me", f"{POD}.serviceAccountName", "no ServiceAccount me among these manifests"),
]


@pytest.mark.parametrize(("path", "value", "where", "what"), OF_THE_JOB)
def test_a_broken_job_is_refused_for_its_reason(good, path, value, where, what):
    with pytest.raises(RequestError) as caught:
        check_documents(edited(good, 2, path, value))
    matching = [message for message in caught.value.messages if f": {where}" in message and what in message]
    assert matching, caught.value.messages
    assert matching[0].startswith("m.yaml: document 2 (")


OF_THE_OTHERS = [
    (3, "spec.accessMode", [], "accessMode"),
    (3, "spec.accessModes", "ReadWriteMany", "accessModes"),
    (3, "apiVersion", "v2", "has no v2 PersistentVolumeClaim"),
    (1, "data.seed", 3, "data.seed"),
    (1, "datas", {}, "datas"),
    (4, "automountServiceAccountTokens", False, "automountServiceAccountTokens"),
]


@pytest.mark.parametrize(("number", "path", "value", "what"), OF_THE_OTHERS)
def test_a_broken_core_kind_is_refused(good, number, path, value, what):
    pytest.importorskip("kubernetes_validate")
    with pytest.raises(RequestError) as caught:
        check_documents(edited(good, number, path, value))
    (message,) = caught.value.messages
    assert message.startswith(f"m.yaml: document {number} (")
    assert what in message


def test_nulls_count_as_left_out(good):
    check_documents(edited(good, 2, "spec.suspend", None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {", "expected the node content"),
        ("kind: A\nkind: B\n", "the key 'kind' is there twice"),
        ("- a\n", "document 1: is list; a manifest is a mapping"),
        ("", "holds no manifest"),
        ("kind: Pod\n", r"document 1 \(Pod \): apiVersion: is missing"),
    ],
)
def test_what_is_no_manifest(tmp_path, text, message):
    file = tmp_path / "m.yaml"
    file.write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        check(file)
    assert str(file) in str(caught.value)


def test_the_command(tmp_path, good):
    render_ = ["k8s", "render", str(ROOT / "jobs" / "demo.yaml"), "-o", str(tmp_path / "demo.yaml")]
    assert CliRunner().invoke(cli, render_, catch_exceptions=False).exit_code == 0
    done = CliRunner().invoke(cli, ["k8s", "check", str(tmp_path)], catch_exceptions=False)
    assert done.output == f"{tmp_path}: 2 manifests are in order\n"
    (tmp_path / "demo.yaml").write_text(
        (tmp_path / "demo.yaml").read_text().replace("submissionMode", "submissionmode")
    )
    with pytest.raises(
        RequestError, match=r"demo.yaml: document 2 \(RayJob demo\): spec.submissionmode: .*did you mean"
    ):
        CliRunner().invoke(cli, ["k8s", "check", str(tmp_path)], catch_exceptions=False, standalone_mode=False)


def test_a_folder_of_kustomizations_is_not_read_as_manifests():
    with pytest.raises(RequestError, match=r"check them one by one: .*base"):
        check(ROOT / "k8s")


def test_yaml_is_what_was_rendered(good):
    documents = [Document("m.yaml", place, body) for place, body in enumerate(good, 1)]
    assert list(yaml.safe_load_all(dump(documents))) == good


CONFIG = "spec.rayClusterConfig"
OF_THE_SERVICE = [
    ("spec.serveConfig", "x", "spec.serveConfig", "did you mean serveConfigV2?"),
    ("spec.serveConfigV2", GONE, "spec.serveConfigV2", "names no applications: the cluster would serve nothing"),
    ("spec.serveConfigV2", "applications: []", "spec.serveConfigV2", "names no applications"),
    ("spec.serveConfigV2", "- a\n", "spec.serveConfigV2", "must be YAML with a list `applications`"),
    ("spec.serveConfigV2", "a: [", "spec.serveConfigV2", "must be YAML with a list `applications`"),
    ("spec.serveConfigV2", "applications: [{name: a}]", "spec.serveConfigV2", "applications[0].import_path is missing"),
    ("spec.upgradeStrategy.type", "Rolling", "spec.upgradeStrategy.type", "must be one of NewCluster, "),
    ("spec.rayClusterConfig", GONE, "spec.rayClusterConfig", "is missing"),
    (f"{CONFIG}.authOptions.enableK8sTokenAuth", True, f"{CONFIG}.authOptions.enableK8sTokenAuth", "not for a RayServ"),
    ("spec.serveConfigV2", "applications: [{import_path: 5}]", "spec.serveConfigV2", "import_path is missing"),
    (f"{CONFIG}.headGroupSpec.headService", {"metadata": {"name": "a"}},
     f"{CONFIG}.headGroupSpec.headService.metadata.name", "leave it out"),
    ("spec.upgradeStrategy.type", "NewClusterWithIncrementalUpgrade", f"{CONFIG}.enableInTreeAutoscaling", "needs the"),
    ("spec.upgradeStrategy.type", "NewClusterWithIncrementalUpgrade", "spec.upgradeStrategy.clusterUpgradeOptions",
     "is missing"),
    ("metadata.name", "a" * 48, "metadata.name", "has 48 characters; a RayService may have 47"),
    (f"{CONFIG}.headGroupSpec.template.spec.hostNetwork", True, f"{CONFIG}.headGroupSpec.template.spec.hostNetwork",
     "pod security `restricted`"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "place", "told"), OF_THE_SERVICE)
def test_a_service_that_is_broken(path: str, value: Any, place: str, told: str) -> None:
    bodies = [d.body for d in render_service(read_job(ROOT / "jobs" / "demo.yaml"), OVERLAYS["cpu"])]
    check_documents([Document("m.yaml", number, body) for number, body in enumerate(bodies, 1)])
    with pytest.raises(RequestError) as refused:
        check_documents(edited(bodies, 2, path, value))
    assert any(f": {place}" in message and told in message for message in refused.value.messages), (
        refused.value.messages
    )


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("securityContext", {}, "runAsNonRoot: must be true"),
        ("containers[0].resources", {}, "containers[0].resources"),
        ("containers[0].image", "rayloom", "containers[0].image"),
    ],
)
def test_a_scheduled_pod_that_is_not_safe(field: str, value: Any, told: str) -> None:
    body = yaml.safe_load((ROOT / "k8s" / "scheduled" / "nightly.yaml").read_text())
    check_documents([Document("m.yaml", 1, body)])
    with pytest.raises(RequestError) as refused:
        check_documents(edited([body], 1, f"spec.jobTemplate.spec.template.spec.{field}", value))
    assert any(f"spec.jobTemplate.spec.template.spec.{told}" in message or told in message
               for message in refused.value.messages)  # fmt: skip
