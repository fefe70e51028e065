"""Manifests as documents that know where they stand: files, folders of them, and kustomizations."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayloom.errors import RequestError

_KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
_KUSTOMIZE_SECONDS = 60.0

Fault = tuple[str, str]
"""(path of the field, what is wrong with it and what would be right)"""


@dataclass(frozen=True)
class Document:
    """One manifest."""

    file: str
    number: int
    """Its place among the documents of the file, from 1."""
    body: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body.get("kind", ""))

    @property
    def api_version(self) -> str:
        return str(self.body.get("apiVersion", ""))

    @property
    def name(self) -> str:
        metadata = self.body.get("metadata")
        return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""

    def message(self, fault: Fault) -> str:
        """`FILE: document 2 (RayJob demo): spec.entrypoint: ...`."""
        path, text = fault
        return f"{self.file}: document {self.number} ({self.kind or 'no kind'} {self.name}): {path}: {text}"


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys; the API server under strict validation refuses them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_documents(path: str | Path) -> list[Document]:
    """The manifests of a file, of a folder's `*.yaml` files, or of what `kubectl kustomize` makes of a folder.

    Raises:
        RequestError: nothing there, no YAML, or a kustomization that cannot be built.
    """
    path = Path(path)
    if path.is_dir() and any((path / name).exists() for name in _KUSTOMIZATIONS):
        return list(_parse(str(path), _kustomize(path)))
    files = sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")]) if path.is_dir() else [path]
    if path.is_dir() and (nested := [file.parent for file in files if file.name in _KUSTOMIZATIONS]):
        raise RequestError(
            f"{path}: holds kustomizations, whose files are pieces; check them one by one: "
            + ", ".join(map(str, sorted(set(nested))))
        )
    if not files:
        raise RequestError(f"{path}: holds no .yaml file")
    documents: list[Document] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{file}: cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise RequestError(f"{file}: is no UTF-8 text") from None
        documents += _parse(str(file), text)
    if not documents:
        raise RequestError(f"{path}: holds no manifest")
    return documents


def _parse(file: str, text: str) -> Iterator[Document]:
    try:
        bodies = list(yaml.load_all(text, Loader=_UniqueKeys))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RequestError(f"{file}{where}: {getattr(error, 'problem', None) or error}") from None
    for number, body in enumerate(bodies, 1):
        if body is None:
            continue
        if not isinstance(body, dict):
            raise RequestError(f"{file}: document {number}: is {type(body).__name__}; a manifest is a mapping")
        yield Document(file, number, body)


def _kustomize(folder: Path) -> str:
    if not (kubectl := shutil.which("kubectl")):
        raise RequestError(f"{folder}: is a kustomization, which kubectl builds, and kubectl is not on the PATH")
    try:
        done = subprocess.run(
            [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=_KUSTOMIZE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise RequestError(f"{folder}: kubectl kustomize did not end within {_KUSTOMIZE_SECONDS:g} s") from None
    if done.returncode:
        raise RequestError(
            f"{folder}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'kubectl failed'}"
        )
    return done.stdout
