"""The policy's weights, out of the trainer's model: what the engines are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def policy_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """All that the engines need of a model: the adapter, named as PEFT saves it, or of a model without one every
    weight, of tied ones the first."""
    parameters = model.named_parameters()
    if hasattr(model, "peft_config"):
        own = ((name, one) for name, one in parameters if f".{POLICY}." in name and "lora_" in name)
        return {name.replace(f".{POLICY}.", "."): one for name, one in own}
    return {name: one for name, one in parameters if not name.startswith("v_head.")}


def policy_tensors(parameters: Mapping[str, torch.nn.Parameter], *, keep: bool) -> dict[str, torch.Tensor]:
    """The parameters' values on CPU. Copies, but for those that stand there whole: until the next step.

    Every rank calls it where ZeRO-3 shards the weights, which are gathered one by one.

    Args:
        keep: whether this rank wants them; else what comes back is empty.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        with _whole(parameter) as is_gathered:
            if keep:
                tensors[name] = parameter.detach().to("cpu", copy=is_gathered).contiguous()
    return tensors


@contextmanager
def _whole(parameter: torch.Tensor) -> Iterator[bool]:
    """Whether the parameter is whole within the context only."""
    if not hasattr(parameter, "ds_id"):
        yield False
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield True
