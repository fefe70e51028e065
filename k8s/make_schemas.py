"""Write `platform/rayloom/k8s/schemas/` from KubeRay's CRDs: `python k8s/make_schemas.py FOLDER_OF_CRDS`.

The folder is `ray-operator/config/crd/bases/` of github.com/ray-project/kuberay at tag v1.7.0 (Apache-2.0).

A CRD's structural schema becomes a JSON schema that says what the API server does under strict field validation: a
field that the schema does not name is refused, and one that has a default need not be there. Descriptions, the
deprecated versions and the CEL rules (`operator_rules.py` has them) are left out, and of subtrees that occur several
times (a pod's template is in the head, the workers and the submitter) one is kept: a thirtieth of the size.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

VERSION = "v1.7.0"
KINDS = {
    "RayCluster": "ray.io_rayclusters.yaml",
    "RayJob": "ray.io_rayjobs.yaml",
    "RayService": "ray.io_rayservices.yaml",
}
TARGET = Path(__file__).resolve().parents[1] / "platform" / "rayloom" / "k8s" / "schemas"
_KEPT = "type format enum pattern minimum maximum minLength maxLength minItems maxItems minProperties".split()
_WORTH = 200  # characters; a shorter subtree costs less than a reference to it


def strict(node: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a structural schema."""
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]} | {key: node[key] for key in ("pattern",) if key in node}
    new = {key: node[key] for key in _KEPT if key in node}
    if node.get("nullable") and "type" in new:
        new["type"] = [new["type"], "null"]
    if "properties" in node:
        new["properties"] = {name: strict(child) for name, child in node["properties"].items()}
        defaulted = {name for name, child in node["properties"].items() if "default" in child}
        if required := sorted(set(node.get("required", ())) - defaulted):
            new["required"] = required
        new["additionalProperties"] = bool(node.get("x-kubernetes-preserve-unknown-fields"))
    elif isinstance(node.get("additionalProperties"), dict):
        new["additionalProperties"] = strict(node["additionalProperties"])
    if "items" in node:
        new["items"] = strict(node["items"])
    return new


def shared(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema with `$defs` for what occurs more than once."""
    counts: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, dict):
            counts[json.dumps(node, sort_keys=True)] += 1
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            count(child)

    count(schema)
    names: dict[str, str] = {}
    definitions: dict[str, Any] = {}

    def replace(node: Any, *, is_schema: bool = True) -> Any:
        if isinstance(node, list):
            return [replace(child) for child in node]
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        # Only a schema may be a reference; the mapping under `properties` is none.
        repeated = is_schema and counts[text] > 1 and len(text) >= _WORTH
        if repeated and text in names:
            return {"$ref": f"#/$defs/{names[text]}"}
        new = {key: replace(child, is_schema=not is_schema or key != "properties") for key, child in node.items()}
        if not repeated:
            return new
        names[text] = f"d{len(names)}"
        definitions[names[text]] = new
        return {"$ref": f"#/$defs/{names[text]}"}

    return {**replace(schema), "$defs": definitions}


def main(folder: Path) -> None:
    TARGET.mkdir(exist_ok=True)
    for kind, file in KINDS.items():
        crd = yaml.load((folder / file).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}  # the API server's own; `schema.py` looks at it
        schema["title"] = f"{kind} ray.io/v1 of KubeRay {VERSION}"
        target = TARGET / f"{kind.lower()}.json"
        target.write_text(json.dumps(shared(schema), separators=(",", ":")) + "\n")
        print(f"{target.name}: {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
