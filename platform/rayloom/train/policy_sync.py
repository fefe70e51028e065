"""New weights to the engines, and the proof that they serve them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch

from rayloom.errors import JobError
from rayloom.rollout.engine import place_and_gpus
from rayloom.rollout.fleet import FleetClient
from rayloom.rollout.weights import POLICY, policy_parameters, policy_tensors, weights_to_send
from rayloom.train.collective import from_first_rank

_FINE, _ROUGH = 5e-3, 0.3
"""How far an engine's log-probability of a token may be from the trainer's, on average over the probe's tokens: two
implementations compute it; in bf16 and fp16, of either, with three digits. That each weight arrived is told by the
digest."""

NextLogProbs = Callable[[Sequence[int]], torch.Tensor]
"""The policy's log-probabilities of what comes behind a text, (vocab,) float32 on CPU."""


class PolicySync:
    """Knows which version the engines serve."""

    def __init__(
        self, client: FleetClient, precisions: Set[str], *, is_first_rank: bool, shares_gpus: bool = False
    ) -> None:
        """
        Args:
            precisions: what the trainer and the engines compute in.
            shares_gpus: whether the engines are on the trainers' GPUs (`rollout.share_gpus`).
        """
        self._client, self._is_first_rank, self._shares_gpus = client, is_first_rank, shares_gpus
        self._model: Any = None  # whose policy was served last, its parameters, and its adapter's configuration
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._adapter: dict[str, Any] | None = None
        self._tolerance = _FINE if precisions == {"fp32"} else _ROUGH
        self._served: int | None = None
        self._own: dict[int, torch.Tensor] = {}
        """Of the last versions served, the last one first: what the policy says comes behind the probe."""
        self.seconds = 0.0
        """Of the last sync, from the trainer's weights to the last engine's proof, and of the comparison."""
        self.difference = 0.0
        """Between the engines' and the trainer's log-probabilities of the probe, the largest mean of an engine, when
        they were compared last."""

    def serve(self, version: int, model: Any) -> None:
        """Return when all engines serve the model's weights as `version`: each has told how many tensors it holds, and
        which. Every rank calls it.

        Raises:
            JobError: an engine does not answer, or does not serve what it was given.
        """
        if self._shares_gpus:
            if self._served is None:
                check_shared_gpu(place_and_gpus(), self._client.gpus())
            make_room()
        if self._served == version:
            return
        started = time.monotonic()
        if model is not self._model:  # it is one model for a whole job, and the walk over its modules takes a while
            adapters = getattr(model, "peft_config", None)
            self._adapter = plain_config(adapters[POLICY].to_dict()) if adapters else None
            self._model, self._parameters = model, policy_parameters(model)
        tensors = policy_tensors(self._parameters, keep=self._is_first_rank)
        if self._is_first_rank:
            self._client.sync(weights_to_send(version, tensors, self._adapter))
        else:  # here, and not in the next collective call: engines may need longer than `train.collective_timeout`
            self._client.wait_for(version)
        self._served, self.seconds = version, time.monotonic() - started

    def compare(self, next_log_probs: NextLogProbs) -> None:
        """See whether the engines computed on the probe what the model computes with the weights that they serve. An
        engine answers it with its first prompts after a sync; so this is called behind a round's answers, and before
        anything is learnt from them. Every rank calls it, before the weights change.

        Raises:
            JobError: one does not.
        """
        assert self._served is not None
        started = time.monotonic()
        if self._served not in self._own:
            # Rounds that were asked ahead are answered by the version before, which nothing is asked of afterwards.
            self._own = {self._served: next_log_probs(self._client.probe_prompt), **dict(list(self._own.items())[:1])}
        probes = from_first_rank(self._client.probes() if self._is_first_rank else [])
        self.difference = 0.0 if probes else self.difference
        for probe in probes:
            own = self._own[probe.version][list(probe.token_ids)]
            difference = float((own - torch.tensor(probe.log_probs)).abs().mean())
            self.difference = max(self.difference, difference)
            if not difference <= self._tolerance:  # also where it is no number
                raise JobError(
                    f"engine {probe.engine} does not compute what the trainer computes: with the weights of version "
                    f"{probe.version} the log-probabilities of a probe differ by {difference:.3g} on average, and may "
                    f"by {self._tolerance:g}"
                )
        self.seconds += time.monotonic() - started


Place = tuple[str, tuple[str, ...]]
"""Ray's id of a node, and the numbers of GPUs there."""


def check_shared_gpu(own: Place, engines: Sequence[Place]) -> None:
    """See that a GPU of this process has an engine of the same job on it, which sleeps while it trains.

    Raises:
        JobError: Ray has put them on different ones, as other jobs have parts of GPUs, too.
    """
    node, gpus = own
    if gpus and not any(node == other and set(gpus) & set(theirs) for other, theirs in engines):
        places = ", ".join(f"GPU {' '.join(theirs)} of node {other[:8]}" for other, theirs in engines)
        raise JobError(
            f"rollout.share_gpus: a worker is on GPU {' '.join(gpus)} of node {node[:8]}, and no engine of the job is; "
            f"the engines are on {places}. Run one such job at a time, on as many GPUs as it has workers"
        )


def make_room() -> None:
    """Give back what memory of the GPUs is only kept for later, before an engine wakes on any of them. Every rank calls
    it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """PEFT's configuration as its file has it: sets as lists, names as texts."""
    plain: dict[str, Any] = json.loads(
        json.dumps(config, default=lambda one: sorted(one) if isinstance(one, set) else str(one))
    )
    return plain
