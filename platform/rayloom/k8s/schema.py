"""Does a manifest have the fields that its kind has? Unknown ones are refused, as `kubectl --validate=strict` does."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from rayloom.errors import RequestError
from rayloom.k8s.documents import Document, Fault

KUBERAY = "v1.7.0"
"""The version of KubeRay whose schemas and rules these are."""
_CORE_VERSION = "1.33"
_RAY_KINDS = ("RayCluster", "RayJob", "RayService")
# Of other operators, whose schemas are not carried: only that they are what they call themselves.
_OTHERS = {
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "LocalQueue": "kueue.x-k8s.io/v1beta1",
}
_METADATA = ("name", "namespace", "labels", "annotations")


def schema_faults(document: Document) -> Iterator[Fault]:
    """Unknown fields, missing ones and wrong values of a document.

    Raises:
        RequestError: a core kind, and the package that checks those is not installed.
    """
    body = document.body
    for field in ("apiVersion", "kind", "metadata"):
        if field not in body:
            yield field, "is missing; every manifest has apiVersion, kind and metadata.name"
            return
    if not document.name:
        yield "metadata.name", "is missing"
        return
    if document.kind in _RAY_KINDS:
        if document.api_version != "ray.io/v1":
            yield "apiVersion", f"{document.api_version}: must be ray.io/v1"
            return
        for field in set(body["metadata"]) - set(_METADATA):
            yield f"metadata.{field}", f"is not known{_nearest(field, _METADATA)}"
        yield from _errors(_without_nulls(body), _validator(document.kind))
    elif document.kind in _OTHERS:
        if document.api_version != _OTHERS[document.kind]:
            yield "apiVersion", f"{document.api_version}: must be {_OTHERS[document.kind]}"
    elif "." in document.api_version.split("/")[0] and not document.api_version.split("/")[0].endswith(".k8s.io"):
        yield "kind", f"{document.api_version} {document.kind} is not known; of Ray there are {', '.join(_RAY_KINDS)}"
    else:
        yield from _core_faults(body)


def _core_faults(body: dict[str, Any]) -> Iterator[Fault]:
    try:
        import kubernetes_validate
    except ImportError:
        raise RequestError(
            f"{body['kind']} is checked by the package kubernetes-validate, which is not installed: "
            "pip install 'rayloom[k8s]'"
        ) from None
    try:
        kubernetes_validate.validate(body, _CORE_VERSION, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        yield "kind", f"Kubernetes {_CORE_VERSION} has no {body['apiVersion']} {body['kind']}"
    except kubernetes_validate.ValidationError as error:
        yield ".".join(map(str, error.path)) or "(document)", error.message


@cache
def _validator(kind: str) -> Any:
    import jsonschema

    text = files("rayloom.k8s").joinpath("schemas", f"{kind.lower()}.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def _errors(body: dict[str, Any], validator: Any) -> Iterator[Fault]:
    for error in sorted(validator.iter_errors(body), key=lambda error: list(map(str, error.absolute_path))):
        path = dotted(error.absolute_path)
        if error.validator == "additionalProperties":
            known = list(error.schema.get("properties", ()))
            for field in sorted(set(error.instance) - set(known)):
                yield f"{path}.{field}".lstrip("."), f"KubeRay {KUBERAY} knows no such field{_nearest(field, known)}"
        elif error.validator == "required":
            for field in sorted(set(error.validator_value) - set(error.instance)):
                yield f"{path}.{field}".lstrip("."), "is missing"
        elif error.validator == "type":
            expected = error.validator_value
            names = expected if isinstance(expected, str) else " or ".join(expected)
            yield path, f"{json.dumps(error.instance)[:60]}: must be of type {names}"
        elif error.validator == "enum":
            yield path, f"{error.instance!r}: must be one of {', '.join(map(str, error.validator_value))}"
        else:
            yield path, error.message[:200]


def dotted(path: Any) -> str:
    """`spec.containers[0].image` of the keys and indices on the way."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return re.sub(r"^\.", "", text)


def _nearest(field: str, known: Any) -> str:
    near = difflib.get_close_matches(field, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _without_nulls(node: Any) -> Any:
    """The API server drops nulls of fields that may not be null."""
    if isinstance(node, dict):
        return {key: _without_nulls(value) for key, value in node.items() if value is not None}
    return [_without_nulls(item) for item in node] if isinstance(node, list) else node
