"""`rayloom k8s render --service`: a RayService that answers with what a job has trained, behind an OpenAI API.

For after the job: the operator starts it, and starts it anew, and the model is found in the shared storage.
"""

from __future__ import annotations

import math

import yaml

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.k8s.documents import Document
from rayloom.k8s.overlay import Overlay
from rayloom.k8s.placed_job import place
from rayloom.k8s.ray_pods import Places, RayPods, kubernetes_name, resources
from rayloom.methods.rules import VIRTUAL_TOKENS

SERVING = "serving"
"""`app.kubernetes.io/component` of its pods."""
PORT = 8000
_CPUS_BESIDE = 2
"""Of each worker beside the engine: for what takes the requests, and for what merges an adapter."""
_BESIDE = (*VIRTUAL_TOKENS, "adapter")
"""Methods whose adapters are no part of any weight (`rayloom.export.merge`)."""


def render_service(
    job: JobConfig, overlay: Overlay, places: Places | None = None, *, name: str | None = None
) -> list[Document]:
    """The ConfigMap and the RayService of a job.

    Args:
        name: of both; by default the job's name and `-service`, in Kubernetes' letters.

    Raises:
        RequestError: a name or a path that Kubernetes cannot have, a device that the overlay has not got, or a job
            whose model no engine serves.
    """
    if job.stage.type == "reward":
        raise RequestError("stage.type: reward: such a job trains a model that judges answers, and writes none")
    if job.method.type in _BESIDE:
        raise RequestError(f"method.type: {job.method.type}: what it trains cannot become a part of the weights")
    if job.output_folder is None:
        raise RequestError(f"output_dir: {job.output_dir} is an address; a service reads its model from the claim")
    if overlay.queue:
        raise RequestError("--queue: a service is not for a queue, which holds what ends; use another overlay")
    places = places or Places()
    own_name = kubernetes_name(name or f"{job.name}-service")
    pods = RayPods(own_name, overlay, places, part=SERVING, ports={"serve": PORT}, calls_kubernetes=False)
    placed = place(job, root=places.root, storage=places.storage, gpus=overlay.gpus)
    rollout = placed.rollout
    application = {
        "name": "llm",
        "route_prefix": "/",
        "import_path": "rayloom.serve.app:build",
        "args": {"job": f"{places.job}/job.yaml", "min_replicas": rollout.engines, "max_replicas": rollout.engines},
    }
    gpus = rollout.tensor_parallel if overlay.gpus else 0
    amounts = resources(math.ceil(rollout.cpus_per_engine) + _CPUS_BESIDE, overlay.engine_memory, gpus)
    ray_service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": pods.name, "labels": pods.labels},
        "spec": {
            "serveConfigV2": yaml.safe_dump({"applications": [application]}, sort_keys=False),
            # Two clusters at once would need the engines twice.
            "upgradeStrategy": {"type": "None"},
            "excludeHeadPodFromServeSvc": True,
            "rayClusterConfig": pods.cluster([pods.workers("engines", rollout.engines, rollout.engines, amounts)]),
        },
    }
    bodies = (pods.config_map(placed), ray_service)
    return [Document(f"{pods.name}.yaml", number, body) for number, body in enumerate(bodies, 1)]
