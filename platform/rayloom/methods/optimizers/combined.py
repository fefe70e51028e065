"""Several optimizers that look like one: Muon for some weights, AdamW for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Combined(torch.optim.Optimizer):
    """Steps each of `optimizers`; its parameter groups are theirs, so a rate that is set here is set there."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> Any:
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of the optimizers, in their order."""
        return {"state": [optimizer.state_dict() for optimizer in self._optimizers], "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` of the same weights."""
        for optimizer, state in zip(self._optimizers, state_dict["state"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()  # loading has made new ones
