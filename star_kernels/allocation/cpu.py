"""The call into csrc/allocation_map.cpp."""

from __future__ import annotations

import torch


def allocation_map(
    mass: torch.Tensor,
    grid: tuple[int, int],
    *,
    combine: str,
    sharpness: float,
    smooth: bool,
    strength: float,
    clamp: tuple[float, float] | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Like the reference, and raises a ValueError for a mass that is negative or not finite at a valid position."""
    return torch.ops.star_kernels_cpu.allocation_map(
        mass, mask, *grid, combine, sharpness, smooth, strength, None if clamp is None else list(clamp)
    )
