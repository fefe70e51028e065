"""A batch's rows side by side in threads of one worker, each with its share of the worker's cores.

On CPU a step is thousands of small operations between its large products. PyTorch divides each of them over the cores
by itself: a barrier for each, and no gain where the operation is smaller than that. Here whole rows are divided
instead: each thread takes some of them forward and backward, as two workers would, with one copy of the weights and
without a process group. For the rest of the trainer the batch is one operation of the trained weights (`_Divided`), so
that DDP, accumulation, clipping and layer-wise optimizers see what they always see.

The rows of a thread depend on the batch and the number of cores only, and their gradients are added in the threads'
order, so that a run that goes on gives what it would have given. What draws random numbers within the model (dropout,
NEFTune) would draw them in no certain order; such jobs, models and methods that keep something from pass to pass, and
jobs that train a large share of the weights, which each thread would hold the gradient of, compute the batch whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch

from rayloom.models.packed_attention import NAME
from rayloom.train.batch import Batch, TrainedPositions
from rayloom.train.frozen_head import FrozenHeadLoss

_LARGEST_SHARE = 0.1
"""Of the model's parameters that train: more are not divided."""
_FOLLOW = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies, a part of the model, are those of the longest row that came last."""


def divides_rows(model: Any, device: torch.device, *, noise: bool) -> bool:
    """Whether a model's batches may be computed by `RowThreads`: it keeps nothing of one pass for the next, and draws
    no random numbers.

    Args:
        device: that the model trains on.
        noise: whether the stage draws random numbers within the model.
    """
    if noise or device.type != "cpu" or torch.get_num_threads() < 2:
        return False
    adapters = getattr(model, "peft_config", {}).values()
    if not adapters or any(one.peft_type != "LORA" for one in adapters):
        return False  # some methods write into their weights as they compute
    config = model.config.to_dict()
    # What takes its attention from the registry has no recurrent state; some rotary embeddings follow the last batch.
    is_stateless = model.config._attn_implementation == NAME
    follows = any(kind in str(value) for name, value in _values(config) if "type" in name for kind in _FOLLOW)
    sizes = [(one.numel(), one.requires_grad) for one in model.parameters()]
    is_small = sum(size for size, trains in sizes if trains) <= _LARGEST_SHARE * sum(size for size, _ in sizes)
    return (
        is_stateless
        and not follows
        and is_small
        and not _drops(model, [config, *(dict(vars(one)) for one in adapters)])
    )


def _drops(model: Any, configs: list[dict[str, Any]]) -> bool:
    """Whether something of a batch is left out by chance: a layer of its own, or a rate that some code reads."""
    if any(isinstance(one, torch.nn.modules.dropout._DropoutNd) and one.p > 0 for one in model.modules()):
        return True
    rates = ((name, value) for config in configs for name, value in _values(config) if isinstance(value, float))
    return any(rate > 0 for name, rate in rates if "drop" in name or "jitter" in name)


def _values(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of a configuration and its parts."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _values(value)
        else:
            yield str(name), value


class RowThreads:
    """Stands before a model's forward pass: a batch that comes with its `positions` is taken forward and backward by
    threads, any other goes through as it is."""

    def __init__(self, model: Any, loss: FrozenHeadLoss, positions: TrainedPositions) -> None:
        self._model, self._loss, self._positions = model, loss, positions
        self.cores = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.cores, thread_name_prefix="rows")
        self._forward = model.forward
        self.threads = 1  # that a batch has been divided over, at most
        self.backward_seconds = 0.0  # of the last batch, within its forward pass; the longest of the threads
        # No bound method: accelerate would bind its function to the model again.
        model.forward = partial(_forward, self)

    def parts(self, batch: Batch) -> int:
        """How many threads take a batch: as many as its rows and the cores divide into evenly."""
        return math.gcd(len(batch["input_ids"]), self.cores)

    def whole(self, *args: Any, **inputs: Any) -> Any:
        """The model's own forward pass."""
        return self._forward(*args, **inputs)

    def divided(self, positions: torch.Tensor, labels: torch.Tensor, inputs: Batch) -> torch.Tensor:
        """The sum of the losses at `positions` (kept,) of the flattened rows; its gradient is computed with it.

        Args:
            labels: (1, kept), the token that each position must predict.
        """
        weights = [weight for weight in self._model.parameters() if weight.requires_grad]
        divided: Any = _Divided.apply
        total: torch.Tensor = divided(partial(self._run, positions, labels[0], inputs, weights), *weights)
        return total

    def _run(
        self, positions: torch.Tensor, labels: torch.Tensor, inputs: Batch, weights: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """The summed loss, and its gradient by each weight; None where no row comes by it."""
        parts = self.parts(inputs)
        self.threads = max(self.threads, parts)
        rows, length = inputs["input_ids"].shape
        cores, size = self.cores // parts, rows // parts
        autocast = {
            "device_type": "cpu",
            "enabled": torch.is_autocast_enabled("cpu"),
            "dtype": torch.get_autocast_dtype("cpu"),
            "cache_enabled": False,  # the cache is one for all threads, and the first that is done empties it
        }
        jobs = []
        for first in range(0, rows, size):
            here = (positions >= first * length) & (positions < (first + size) * length)
            if not here.any():
                continue  # nothing of it is trained
            own = {
                name: value[first : first + size] if torch.is_tensor(value) and value.dim() > 1 else value
                for name, value in inputs.items()
            }
            work = partial(self._part, own, positions[here] - first * length, labels[here], weights, autocast, cores)
            jobs.append(self._pool.submit(work))
        wait(jobs)
        torch.set_num_threads(self.cores)  # for threads to come; each of ours has set its own
        losses, gradients, seconds = zip(*(job.result() for job in jobs), strict=True)
        self.backward_seconds = max(seconds)
        return torch.stack(losses).sum(), [_sum(of_weight) for of_weight in zip(*gradients, strict=True)]

    def _part(
        self,
        inputs: Batch,
        positions: torch.Tensor,
        labels: torch.Tensor,
        weights: list[torch.Tensor],
        autocast: dict[str, Any],
        cores: int,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...], float]:
        torch.set_num_threads(cores)
        hidden: list[torch.Tensor] = []
        self._positions.choose(positions, take=hidden.append)
        with torch.enable_grad():
            with torch.autocast(**autocast):
                self._forward(**inputs)
                total = self._loss.summed(hidden.pop(), labels, self.cores // cores)
            began = time.perf_counter()
            gradients = torch.autograd.grad(total, weights, allow_unused=True)
        return total.detach(), gradients, time.perf_counter() - began


def _forward(threads: RowThreads, *args: Any, **inputs: Any) -> Any:
    if "positions" not in inputs:
        return threads.whole(*args, **inputs)
    positions, labels = inputs.pop("positions"), inputs.pop("shift_labels")
    return {"summed": threads.divided(positions, labels, inputs)}


def _sum(gradients: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    """In float32: those of 16 bits are rounded once."""
    there = [one for one in gradients if one is not None]
    if not there:
        return None
    total = there[0].to(torch.promote_types(there[0].dtype, torch.float32))
    for one in there[1:]:
        total = total + one
    return total.to(there[0].dtype)


class _Divided(torch.autograd.Function):
    """What a function that computes its own gradient makes of some weights."""

    @staticmethod
    def forward(ctx: Any, run: Any, *weights: torch.Tensor) -> torch.Tensor:
        total, ctx.gradients = run()
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        own, ctx.gradients = ctx.gradients, None
        return None, *(one if one is None else one * gradients[0].to(one.dtype) for one in own)
