"""What differs between kinds of Kubernetes clusters. `k8s/overlays/` has the same four as kustomizations; a test
compares."""

from __future__ import annotations

from dataclasses import dataclass

from rayloom import __version__


@dataclass(frozen=True)
class Overlay:
    """How large the pods are and what they run on."""

    image: str = f"rayloom:{__version__}-cpu"
    """Container image, with Rayloom in it."""
    gpus: bool = False
    """Whether each train worker and engine has GPUs."""
    worker_memory: str = "8Gi"
    """Of each train worker's pod."""
    engine_memory: str = "16Gi"
    """Of each engine's pod."""
    head_cpus: int = 2
    head_memory: str = "4Gi"
    queue: str | None = None
    """Kueue's LocalQueue; a job then waits until all of its pods fit."""
    retries: int = 2
    """New clusters that the operator makes after a failure; the run goes on from its last checkpoint."""


OVERLAYS = {
    "cpu": Overlay(),
    "gpu": Overlay(image=f"rayloom:{__version__}-gpu", gpus=True, worker_memory="64Gi", engine_memory="64Gi"),
    "kueue": Overlay(queue="rayloom"),
    "dev": Overlay(worker_memory="4Gi", engine_memory="8Gi", head_cpus=1, head_memory="3Gi", retries=0),
}
