"""GaLore: memory-efficient training by gradient low-rank projection (Zhao et al. 2024, https://arxiv.org/abs/2403.03507).

Algorithm 2: every `update_proj_gap` steps P = the first singular vectors of G; then
R = Pᵀ G; N = Adam(R); W <- W - lr * scale * P N. The moments of an earlier projection are kept, as the authors do.

Of our own, since the published package (galore-torch 1.0, 2024) needs a GPU for 8 bits, keeps projections in objects
that `torch.load(weights_only=True)` refuses, and takes deprecated calls of transformers.
"""

from __future__ import annotations

from typing import Any

import torch

from rayloom.methods.optimizers.low_rank import InnerFactory, LowRank, Matrix
from rayloom.methods.optimizers.projection import Projection, sides, svd_projection
from rayloom.methods.optimizers.targets import Group


class GaLore(LowRank):
    """GaLore around any inner optimizer. `rank`, `scale` and `proj_type` as in `GaloreConfig`."""

    def __init__(
        self,
        plain: list[Group],
        projected: list[Group],
        inner: InnerFactory,
        *,
        rank: int,
        scale: float,
        proj_type: str = "std",
        **options: Any,
    ) -> None:
        self._rank, self._scale, self._proj_type = rank, scale, proj_type
        super().__init__(plain, projected, inner, **options)

    def project(self, matrix: Matrix, gradient: torch.Tensor) -> Projection:
        return svd_projection(gradient, self._rank, sides(gradient.shape, self._proj_type))

    def direction(self, matrix: Matrix, gradient: torch.Tensor, low: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        assert matrix.projection is not None
        return matrix.projection.up(moved).mul_(self._scale)
