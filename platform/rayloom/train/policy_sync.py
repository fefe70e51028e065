"""New weights to the engines, and the proof that they serve them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from rayloom.errors import JobError
from rayloom.models.precision import Precision
from rayloom.rollout.digest import digest_of
from rayloom.rollout.fleet import FleetClient
from rayloom.rollout.request import Probe, Weights
from rayloom.rollout.weights import POLICY, policy_tensors
from rayloom.train.collective import from_first_rank

_TOLERANCE: dict[str, float] = {"fp32": 5e-3}
_ROUGH = 0.3
"""How far an engine's log-probability of a token may be from the trainer's, on average over the probe's tokens: two
implementations compute it, in bf16 and fp16 with three digits. That each weight arrived is told by the digest."""

LogProbs = Callable[[Sequence[int], int], list[float]]
"""The policy's log-probabilities of a text's tokens from some place on."""


class PolicySync:
    """Knows which version the engines serve."""

    def __init__(self, client: FleetClient, precision: Precision, *, is_first_rank: bool) -> None:
        self._client, self._is_first_rank = client, is_first_rank
        self._tolerance = _TOLERANCE.get(precision, _ROUGH)
        self._served: int | None = None
        self.seconds = 0.0
        """Of the last sync, from the trainer's weights to the last engine's proof."""
        self.difference = 0.0
        """Between the engines' and the trainer's log-probabilities of the probe, the largest mean of an engine."""

    def serve(self, version: int, model: Any, log_probs: LogProbs) -> None:
        """Return when all engines serve the model's weights as `version`. Every rank calls it.

        Raises:
            JobError: an engine does not answer, or does not serve what it was given.
        """
        if self._served == version:
            return
        started = time.monotonic()
        tensors = policy_tensors(model, keep=self._is_first_rank)
        probes: list[Probe] = []
        if self._is_first_rank:
            is_adapter = hasattr(model, "peft_config")
            weights = Weights(
                version=version,
                kind="adapter" if is_adapter else "full",
                tensors=ray.put(tensors),
                count=len(tensors),
                digest=digest_of(tensors),
                adapter_config=plain_config(model.peft_config[POLICY].to_dict()) if is_adapter else None,
            )
            probes = self._client.sync(weights)
        for engine, token_ids, said in from_first_rank([(p.engine, p.token_ids, p.log_probs) for p in probes]):
            prompt = self._client.probe_prompt
            own = log_probs([*prompt, *token_ids], len(prompt))
            self.difference = sum(abs(a - b) for a, b in zip(own, said, strict=True)) / len(own)
            if self.difference > self._tolerance:
                raise JobError(
                    f"engine {engine} does not compute what the trainer computes: with the weights of version "
                    f"{version} the log-probabilities of a probe differ by {self.difference:.3g} on average, and may "
                    f"by {self._tolerance:g}"
                )
        self._served, self.seconds = version, time.monotonic() - started


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """PEFT's configuration as its file has it: sets as lists, names as texts."""
    plain: dict[str, Any] = json.loads(
        json.dumps(config, default=lambda one: sorted(one) if isinstance(one, set) else str(one))
    )
    return plain
