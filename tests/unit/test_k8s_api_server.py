"""What a real API server says to the manifests: `bash tests/api_server.sh CRDS` makes one, and runs this."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.api_server import Answer, ApiServer
from tests.unit.test_k8s_check import OF_THE_JOB, edited

from rayloom.config.read import read_job
from rayloom.errors import RequestError
from rayloom.k8s.check import check
from rayloom.k8s.overlay import OVERLAYS
from rayloom.k8s.render import render
from rayloom.k8s.schema import schema_faults
from rayloom.k8s.service import render_service

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [path for path in sorted((ROOT / "jobs").rglob("*.yaml")) if path.parent.name != "pipelines"]
PLURALS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}

pytestmark = pytest.mark.skipif(
    not os.environ.get("RAYLOOM_API_SERVER"), reason="needs an API server: bash tests/api_server.sh CRDS"
)


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    """One that serves KubeRay's kinds."""
    with ApiServer(Path(os.environ["RAYLOOM_API_SERVER"])) as running:
        for plural in PLURALS.values():
            file = Path(os.environ["RAYLOOM_CRDS"]) / f"ray.io_{plural}.yaml"
            running.define(yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        yield running


def create(server: ApiServer, body: dict[str, Any], *, dry: bool = True) -> Answer:
    path = f"/apis/ray.io/v1/namespaces/rayloom/{PLURALS[body['kind']]}"
    mode = "dryRun=All&" if dry else ""
    body = {**body, "metadata": {**body["metadata"], "namespace": "rayloom"}}
    return server.call("POST", f"{path}?{mode}fieldValidation=Strict", body)


def ray_kinds(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [body for body in bodies if body["kind"] in PLURALS]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which builds kustomizations")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_taken(overlay: str, server: ApiServer) -> None:
    """And what is stored is what was written, apart from defaults: nothing was dropped."""
    bodies = ray_kinds([document.body for document in check(ROOT / "k8s" / "overlays" / overlay)])
    assert any(body["kind"] == "RayJob" for body in bodies)
    for body in bodies:
        answer = create(server, body, dry=False)
        assert answer.status == 201, answer.message
        path = f"/apis/ray.io/v1/namespaces/rayloom/{PLURALS[body['kind']]}/{body['metadata']['name']}"
        stored = server.call("GET", path).body["spec"]
        assert server.call("DELETE", path).status == 200
        assert not list(missing(body["spec"], stored, "spec"))


def missing(part: Any, whole: Any, path: str) -> Iterator[str]:
    """What of one document is not in another that may have more."""
    if isinstance(part, dict) and isinstance(whole, dict):
        for key, value in part.items():
            yield from missing(value, whole.get(key), f"{path}.{key}")
    elif isinstance(part, list) and isinstance(whole, list) and len(part) == len(whole):
        for number, (one, other) in enumerate(zip(part, whole, strict=True)):
            yield from missing(one, other, f"{path}[{number}]")
    elif part != whole:
        yield f"{path}: {part} is {whole}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_recipe_is_taken(overlay: str, server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = ["train.device=auto"] if overlay == "gpu" else []
    for recipe in RECIPES:
        job = read_job(recipe, overrides)
        documents = render(job, OVERLAYS[overlay])
        with suppress(RequestError):  # not every model can be served
            documents += render_service(job, OVERLAYS[overlay])
        for body in ray_kinds([document.body for document in documents]):
            answer = create(server, body)
            assert answer.status == 201, f"{recipe}: {answer.message}"


# What the API server refuses beyond our schema, in the words of `rayloom k8s check`: by rules of the CRD (CEL), which
# we count among the operator's, and where two items of a list have the same key, which we count among our policy's.
ALSO_REFUSED = {
    "must be ray.io/kuberay-operator or kueue",
    "needs deletionRules, or both",
    "do not go with",
    "/shared is mounted twice",
}


@pytest.fixture(scope="module")
def demo() -> list[dict[str, Any]]:
    return [document.body for document in render(read_job(ROOT / "jobs" / "demo.yaml"), OVERLAYS["cpu"])]


@pytest.mark.parametrize(
    ("path", "value", "said"), [(path, value, said) for path, value, _, said in OF_THE_JOB if path.startswith("spec.")]
)
def test_it_refuses_what_our_schema_refuses(
    path: str, value: Any, said: str, server: ApiServer, demo: list[dict[str, Any]]
) -> None:
    """And takes what only the operator or our policy refuses."""
    document = edited(copy.deepcopy(demo), 2, path, value)[1]
    answer = create(server, document.body)
    if said in ALSO_REFUSED or list(schema_faults(document)):
        assert answer.status in (400, 422), "it takes what our check refuses"
    else:
        assert answer.status == 201, answer.message
