"""APOLLO: SGD-like memory, AdamW-level performance (Zhu et al. 2024, https://arxiv.org/abs/2412.05270).

Algorithm 1: R = P G with a random P; N = AdamW's direction for R. Each channel j of G (a row or column along the side
that is not projected) is scaled by s_j = |N_j| / |R_j|, or the whole matrix by |N| / |R| (APOLLO-Mini);
W <- W - lr * sqrt(scale) * G s. The norm of a step grows by at most 1 % (Fira's limiter, as the authors have it).

Of our own, since the published package (apollo-torch 1.0.3, 2025) keeps projections in objects that
`torch.load(weights_only=True)` refuses and seeds them by a parameter's place in its group only.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from rayloom.methods.optimizers.low_rank import InnerFactory, LowRank, Matrix
from rayloom.methods.optimizers.projection import Projection, mixed_seed, random_projection, sides, svd_projection
from rayloom.methods.optimizers.targets import Group

_GROWTH = 1.01
_TINY = 1e-8  # keeps a channel without gradient from dividing by zero


class Apollo(LowRank):
    """APOLLO around AdamW. The fields as in `ApolloConfig`; `seed` draws the projections."""

    def __init__(
        self,
        plain: list[Group],
        projected: list[Group],
        inner: InnerFactory,
        *,
        rank: int,
        scale: float,
        scale_type: str = "channel",
        proj: str = "random",
        proj_type: str = "std",
        seed: int = 0,
        **options: Any,
    ) -> None:
        self._rank, self._scale, self._scale_type = rank, scale, scale_type
        self._proj, self._proj_type, self._seed = proj, proj_type, seed
        super().__init__(plain, projected, inner, **options)

    def project(self, matrix: Matrix, gradient: torch.Tensor) -> Projection:
        which = sides(gradient.shape, self._proj_type)
        if self._proj == "svd":
            return svd_projection(gradient, self._rank, which)
        return random_projection(gradient, self._rank, which, mixed_seed(self._seed, matrix.index, matrix.step))

    def direction(self, matrix: Matrix, gradient: torch.Tensor, low: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        assert matrix.projection is not None
        if self._scale_type == "tensor":
            factors = moved.norm() / (low.norm() + _TINY)
        else:
            projected = 0 if matrix.projection.left is not None else 1
            factors = moved.norm(dim=projected, keepdim=True) / (low.norm(dim=projected, keepdim=True) + _TINY)
        scaled = gradient * factors
        norm = scaled.norm()
        if matrix.norm is not None:
            limiter = (norm / (matrix.norm + _TINY)).clamp(min=_GROWTH) / _GROWTH
            scaled, norm = scaled / limiter, norm / limiter
        matrix.norm = norm
        return scaled.mul_(-math.sqrt(self._scale))
