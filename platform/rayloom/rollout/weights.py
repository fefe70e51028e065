"""The policy's weights, out of the trainer's model: what the engines are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch

from rayloom.rollout.adapter_folders import pack
from rayloom.rollout.digest import digest_of
from rayloom.rollout.request import Weights

POLICY = "default"
"""PEFT's name of the adapter that trains."""


def weights_to_send(version: int, tensors: dict[str, torch.Tensor], adapter: dict[str, Any] | None) -> Weights:
    """One policy version with its tensors in Ray's object store.

    Args:
        tensors: `policy_tensors`.
        adapter: PEFT's configuration as its file has it; None: they are no adapter's.
    """
    return Weights(
        version=version,
        kind="full" if adapter is None else "adapter",
        tensors=ray.put(tensors if adapter is None else pack(tensors)),
        count=len(tensors),
        digest=digest_of(tensors),
        adapter_config=adapter,
    )


def policy_tensors(model: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """The adapter as PEFT saves it, or of a model without one every weight as transformers saves it: copies on CPU.

    Every rank calls it where ZeRO-3 shards the weights, which are gathered one by one.

    Args:
        keep: whether this rank wants them; else what comes back is empty.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in _parts(model):
        with _whole(parameter):
            if keep:
                tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return tensors


def _parts(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weight of all that the engines need."""
    if hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters():
            if f".{POLICY}." in name and "lora_" in name:
                yield name.replace(f".{POLICY}.", "."), parameter
        return
    for name, parameter in model.named_parameters():  # of tied weights one
        if not name.startswith("v_head."):
            yield name, parameter


@contextmanager
def _whole(parameter: torch.Tensor) -> Iterator[None]:
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield
