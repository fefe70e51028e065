"""Means of what is measured, over ranks and since they were last read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rayloom.train.collective import of_all_ranks, over_ranks


class Means:
    """Sums and counts by name. Nothing else is kept of what is added."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._last: dict[str, float] = {}

    def add(self, numbers: Mapping[str, torch.Tensor]) -> None:
        """Count every element of each tensor."""
        for name, values in numbers.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + float(values.double().sum()), count + values.numel()

    def read(self, device: Any) -> dict[str, float]:
        """The means of what all ranks have added since the last time; where none has added anything, those of then.
        Of a name under which no rank has an element there is none. Every rank calls it."""
        names = sorted({name for names in of_all_ranks(list(self._sums)) for name in names})
        mine = [self._sums.get(name, (0.0, 0)) for name in names]
        sums = over_ranks(torch.tensor(mine, dtype=torch.float64).reshape(-1, 2), device)
        self._sums = {}
        if names:
            pairs = zip(names, sums.tolist(), strict=True)
            self._last = {name: total / count for name, (total, count) in pairs if count}
        return self._last
