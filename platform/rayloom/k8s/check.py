"""`rayloom k8s check`: manifests against KubeRay's schemas, its operator's rules and our policy, without a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rayloom.errors import RequestError
from rayloom.k8s.documents import Document, load_documents
from rayloom.k8s.operator_rules import operator_faults
from rayloom.k8s.policy import policy_faults, reference_faults
from rayloom.k8s.schema import schema_faults


def check(path: str | Path) -> list[Document]:
    """Check a file, a folder of manifests or a kustomization, which `kubectl kustomize` builds.

    Raises:
        RequestError: one message per fault: file, document, path of the field, what would be right.
    """
    documents = load_documents(path)
    check_documents(documents)
    return documents


def check_documents(documents: Sequence[Document]) -> None:
    """The same of documents.

    Raises:
        RequestError: as `check`.
    """
    faults: list[str] = []
    sound: list[Document] = []
    for document in documents:
        found = list(schema_faults(document))
        if not found:  # rules read fields as what the schema says they are
            sound.append(document)
            found = [*operator_faults(document), *policy_faults(document)]
        faults += [document.message(fault) for fault in found]
    faults += [document.message(fault) for document, fault in reference_faults(sound)]
    if faults:
        raise RequestError(*faults)
