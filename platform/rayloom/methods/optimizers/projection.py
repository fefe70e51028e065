"""Projections of a gradient matrix to a low rank, for GaLore and APOLLO.

A gradient G (m, n) is projected by `left` (m, rank), by `right` (rank, n), or by both:
low = leftᵀ G rightᵀ, and back: left low right. A missing factor stands for the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Sides = tuple[bool, bool]
"""Whether there is a left factor and whether there is a right one."""


@dataclass(frozen=True)
class Projection:
    """The factors of one projection."""

    left: torch.Tensor | None
    right: torch.Tensor | None

    def down(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient (m, n) at low rank."""
        low = gradient if self.left is None else self.left.T @ gradient
        return low if self.right is None else low @ self.right.T

    def up(self, low: torch.Tensor) -> torch.Tensor:
        """From low rank back to (m, n)."""
        full = low if self.left is None else self.left @ low
        return full if self.right is None else full @ self.right


def sides(shape: torch.Size, kind: str) -> Sides:
    """The factors that `proj_type` means for a matrix: `std` projects the shorter side, as GaLore's authors do."""
    right = shape[0] >= shape[1]
    named = {"std": (not right, right), "reverse_std": (right, not right), "left": (True, False)}
    return {**named, "right": (False, True), "full": (True, True)}[kind]


def svd_projection(gradient: torch.Tensor, rank: int, which: Sides) -> Projection:
    """The first `rank` singular vectors of the gradient (GaLore, section 3). The same gradient gives the same factors,
    so workers that average their gradients agree on them without a word."""
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    return Projection(
        left[:, :rank].clone() if which[0] else None,  # clones: a view would keep all singular vectors alive
        right[:rank].clone() if which[1] else None,
    )


def random_projection(gradient: torch.Tensor, rank: int, which: Sides, seed: int) -> Projection:
    """Gaussian factors of variance 1 / rank (APOLLO, section 4), drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=gradient.dtype) / math.sqrt(rank)).to(gradient.device)

    rows, columns = gradient.shape
    return Projection(draw(rows, rank) if which[0] else None, draw(rank, columns) if which[1] else None)


def mixed_seed(*numbers: int) -> int:
    """One seed, below 2^63, of several numbers; order matters."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return seed
