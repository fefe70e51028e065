"""BAdam: memory-efficient full-parameter training (Luo et al. 2024, https://arxiv.org/abs/2404.02827).

Algorithm 1: weights are cut into blocks; Adam trains one block for `switch_interval` steps, with moments that start at
zero, while all others stand still. Moments, gradients and, for weights in 16 bits, the fp32 copy are there for the
active block only.

- Mode layer: a block is one layer. The weights of the others do not ask for gradients, so none are computed for them.
- Mode ratio: a block is a share of the entries of every weight, told by a mask that moves on with each switch.

Which block is active is a pure function of the step, the seed and the options: nothing random to save, and the same on
all workers. Of our own, since the published package (badam 1.4, 2025) wants a GPU, saves no block position, and makes
its first block one step too short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayloom.methods.optimizers.low_rank import InnerFactory
from rayloom.methods.optimizers.projection import mixed_seed
from rayloom.methods.optimizers.targets import Group, working_dtype


def active_block(period: int, blocks: int, mode: str, start: int | None, seed: int) -> int:
    """Number of the block (0 to blocks - 1) that trains in a period, which is `switch_interval` steps.

    `random` takes each block once, in an order of its own for each pass; a `start` then counts for the first period.
    """
    if mode == "ascending":
        return ((start or 0) + period) % blocks
    if mode == "descending":
        return ((blocks - 1 if start is None else start) - period) % blocks
    if mode == "fixed":
        return start or 0
    if start is not None and period == 0:
        return start
    generator = torch.Generator().manual_seed(mixed_seed(seed, period // blocks))
    return int(torch.randperm(blocks, generator=generator)[period % blocks])


def active_entries(period: int, size: int, ratio: float, mode: str, seed: int) -> torch.Tensor:
    """Entries (count,), int64 in 0 to size - 1, of a weight that train in a period; at least one.

    `adjacent`: a window that moves on by its own length. `scatter`: the same window on a random order.
    """
    count = max(1, int(size * ratio))
    window = (torch.arange(count) + period * count) % size
    if mode == "adjacent":
        return window
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[window]


@dataclass(frozen=True)
class _Part:
    """Active entries of a weight, and the values that the inner optimizer trains for them."""

    weight: nn.Parameter
    entries: torch.Tensor | None
    """(count,) numbers into the flattened weight; None: all of it."""
    values: nn.Parameter
    """The weight itself where it needs no copy."""

    def take_gradient(self) -> None:
        """Hand the weight's gradient to the values."""
        gradient = self.weight.grad
        if self.values is not self.weight:
            if gradient is not None and self.entries is not None:
                gradient = gradient.view(-1)[self.entries]
            self.values.grad = None if gradient is None else gradient.to(self.values.dtype)

    def put_values(self) -> None:
        """Write the trained values into the weight."""
        if self.values is self.weight:
            return
        self.values.grad = None
        if self.entries is None:
            self.weight.copy_(self.values)
        else:
            self.weight.view(-1)[self.entries] = self.values.to(self.weight.dtype)


class BAdam(torch.optim.Optimizer):
    """BAdam around an inner optimizer, which is made anew for each block.

    Call `begin` when the model is wrapped for training: DistributedDataParallel must see every weight that will ever
    train ask for gradients. A first step does it too.

    Args:
        groups: with `params`, `lr`, `weight_decay`.
        choose: which entries of each weight train in a period: all (None), or their numbers; weights that are missing
            stand still.
        freezes: whether weights that stand still are to ask for no gradients.
    """

    def __init__(
        self,
        groups: list[Group],
        inner: InnerFactory,
        choose: Callable[[int], dict[nn.Parameter, torch.Tensor | None]],
        *,
        switch_interval: int,
        freezes: bool,
    ) -> None:
        self._make_inner, self._choose = inner, choose
        self._interval, self._freezes = switch_interval, freezes
        self._step = 0
        self._inner: torch.optim.Optimizer | None = None
        self._parts: list[list[_Part]] = []  # by group
        super().__init__(groups, {})

    def begin(self) -> None:
        """Make the block of the current step the active one, if there is none yet."""
        if self._inner is None:
            self._enter()

    def _enter(self) -> None:
        chosen = self._choose(self._step // self._interval)
        if self._freezes:
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.requires_grad_(weight in chosen)
                    if weight not in chosen:
                        weight.grad = None
        self._parts = [
            [_part(weight, chosen[weight]) for weight in group["params"] if weight in chosen]
            for group in self.param_groups
        ]
        self._inner = self._make_inner(
            [
                {"params": [part.values for part in parts], "lr": group["lr"], "weight_decay": group["weight_decay"]}
                for group, parts in zip(self.param_groups, self._parts, strict=True)
                if parts
            ]
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One optimizer step on the active block; after the last one of its period the next block is active."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin()
        assert self._inner is not None
        groups = [group for group, parts in zip(self.param_groups, self._parts, strict=True) if parts]
        for group, inner in zip(groups, self._inner.param_groups, strict=True):
            inner["lr"] = group["lr"]
        for parts in self._parts:
            for part in parts:
                part.take_gradient()
        self._inner.step()
        for parts in self._parts:
            for part in parts:
                part.put_values()
        self._step += 1
        if self._step % self._interval == 0:
            self._enter()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The step, from which the block follows, its moments, and the fp32 values of weights in 16 bits."""
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        values = [part.values.data for parts in self._parts for part in parts if _is_master(part)]
        inner = None if self._inner is None else self._inner.state_dict()
        return {"state": {"step": self._step, "inner": inner, "values": values}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` of the same weights; the weights themselves must have been loaded before."""
        state = state_dict["state"]
        for group, values in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(values)
        self._step = state["step"]
        if state["inner"] is None:
            return
        self._enter()
        assert self._inner is not None
        self._inner.load_state_dict(state["inner"])
        masters = [part for parts in self._parts for part in parts if _is_master(part)]
        for part, values in zip(masters, state["values"], strict=True):
            part.values.data.copy_(values)


def _part(weight: nn.Parameter, entries: torch.Tensor | None) -> _Part:
    dtype = working_dtype(weight)
    if entries is None:
        return _Part(weight, None, weight if weight.dtype == dtype else nn.Parameter(weight.detach().to(dtype)))
    entries = entries.to(weight.device)
    return _Part(weight, entries, nn.Parameter(weight.detach().view(-1)[entries].to(dtype)))


def _is_master(part: _Part) -> bool:
    """Whether the values hold more than the weight does."""
    return part.values.dtype != part.weight.dtype


def layer_choice(
    blocks: Sequence[Sequence[nn.Parameter]], mode: str, start: int | None, seed: int
) -> Callable[[int], dict[nn.Parameter, torch.Tensor | None]]:
    """`choose` of mode layer: all of one block of weights."""
    return lambda period: dict.fromkeys(blocks[active_block(period, len(blocks), mode, start, seed)])


def ratio_choice(
    weights: Sequence[nn.Parameter], ratio: float, mode: str, seed: int
) -> Callable[[int], dict[nn.Parameter, torch.Tensor | None]]:
    """`choose` of mode ratio: a share of the entries of each weight."""
    return lambda period: {
        weight: active_entries(period, weight.numel(), ratio, mode, mixed_seed(seed, number))
        for number, weight in enumerate(weights)
    }
