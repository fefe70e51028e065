"""Numbers that all ranks put together."""

from __future__ import annotations

from typing import Any, Literal

import torch


def over_ranks(numbers: torch.Tensor, device: Any, how: Literal["sum", "max"] = "sum") -> torch.Tensor:
    """The sum, or the largest, of every element over all ranks, in float64 on CPU. Every rank calls it."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return numbers.double().cpu()
    shared = numbers.to(device, torch.float64, copy=True)
    operation = torch.distributed.ReduceOp.SUM if how == "sum" else torch.distributed.ReduceOp.MAX
    torch.distributed.all_reduce(shared, operation)
    return shared.cpu()


def from_first_rank(found: Any) -> Any:
    """What rank 0 has, on every rank. Every rank calls it."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return found
    box = [found]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def of_all_ranks(found: Any) -> list[Any]:
    """What each rank has, on every rank, in the order of the ranks. Every rank calls it."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [found]
    boxes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(boxes, found)
    return boxes
