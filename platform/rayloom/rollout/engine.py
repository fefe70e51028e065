"""The Ray actor around an engine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from rayloom.errors import RequestError
from rayloom.models.source import check_model_path
from rayloom.rollout.request import EngineOptions, Probe, Prompt, Rollout, Sampling, Served, Weights
from rayloom.rollout.vllm_engine import VllmEngine


@dataclass(frozen=True)
class Started:
    """An engine that has started."""

    process: int
    created: float
    """When its process was made: with its number it names that one process and no later one."""
    node: str
    seconds: float
    """That loading took."""
    stop_token_ids: tuple[int, ...]


def place_and_gpus() -> tuple[str, tuple[str, ...]]:
    """Of the process that asks: Ray's id of its node, and Ray's numbers of the GPUs that it has there."""
    import ray

    return ray.get_runtime_context().get_node_id(), tuple(map(str, ray.get_gpu_ids()))


class Engine:
    """What Ray runs: one call at a time, in the order in which they come."""

    def __init__(self, options: EngineOptions, number: int) -> None:
        self._options, self._number = options, number
        self._engine: VllmEngine | None = None

    def identity(self) -> tuple[int, float, str]:
        """Process id, when it was made, and Ray's id of the node: known before the model is loaded."""
        import psutil  # type: ignore[import-untyped]
        import ray

        return os.getpid(), psutil.Process().create_time(), ray.get_runtime_context().get_node_id()

    def boot(self) -> Started:
        """Load the model.

        Raises:
            RequestError: it is not on this machine.
        """
        import ray

        began = time.monotonic()
        try:
            check_model_path(self._options.model)
        except RequestError as error:
            raise RequestError(
                f"{error}, on the machine of engine {self._number} ({ray.util.get_node_ip_address()}); every machine "
                "of the cluster needs it under this path"
            ) from None
        self._engine = VllmEngine(self._options, self._number)
        process, created, node = self.identity()
        return Started(process, created, node, time.monotonic() - began, self._engine.stop_token_ids)

    def sync(self, weights: Weights) -> Served:
        """Take weights and say what is served then."""
        import ray

        assert self._engine is not None
        tensors = ray.get(weights.tensors) if weights.tensors is not None else None
        self._engine.take(weights, tensors)
        return self._engine.serves()

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, probe: tuple[int, ...]
    ) -> tuple[list[Rollout], Probe | None, float]:
        """Answers, what the probe says where they are the first with these weights, and the seconds that it took."""
        assert self._engine is not None
        began = time.monotonic()
        rollouts, said = self._engine.generate(prompts, sampling, probe)
        return rollouts, said, time.monotonic() - began

    def rest(self) -> None:
        """Give up the memory of a GPU that is shared, until there are new weights or prompts."""
        assert self._engine is not None
        self._engine.rest()

    def gpus(self) -> tuple[str, tuple[str, ...]]:
        """Ray's id of the node, and its numbers of the GPUs there."""
        return place_and_gpus()

    def close(self) -> None:
        """Remove what the engine has written."""
        if self._engine is not None:
            self._engine.close()
