"""The definition of the allocation map in plain PyTorch, docs/method.md, section 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def allocation_map(
    mass: torch.Tensor,
    grid: tuple[int, int],
    *,
    combine: str = "mean",
    sharpness: float = 1.0,
    smooth: bool = False,
    strength: float = 1.0,
    clamp: tuple[float, float] | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights [B, h, w] from mass [B, h·w, K]; `mask` [B, h, w] is bool, `clamp` is (w_min, w_max).

    Computed in float64, returned in float64 for a float64 mass and in float32 otherwise. Samples go through one by
    one: PyTorch may order a sum, or choose the vector form of a power, by the size of the whole tensor, and a sample's
    weights must not depend on the rest of the batch. A NaN or infinite mass at a valid position makes NaN of all
    weights of its sample.
    """
    valid = torch.ones(mass.shape[0], *grid, dtype=torch.bool, device=mass.device) if mask is None else mask
    maps = [
        _sample_map(mass[b].double(), valid[b], combine, sharpness, smooth, strength, clamp)
        for b in range(mass.shape[0])
    ]
    return torch.stack(maps).to(torch.float64 if mass.dtype == torch.float64 else torch.float32)


def _sample_map(
    mass: torch.Tensor,
    valid: torch.Tensor,
    combine: str,
    sharpness: float,
    smooth: bool,
    strength: float,
    clamp: tuple[float, float] | None,
) -> torch.Tensor:
    # mass [N, K] float64, valid [h, w] -> weights [h, w] float64
    count = valid.sum()
    mass = torch.where(valid.reshape(-1, 1), mass, 0.0)

    total = mass.sum(0)  # [K]
    kept = total != 0  # true for a NaN, so that it stays visible
    share = torch.where(kept, mass / total * count, 0.0)  # [N, K], each unit with mean 1
    m = share.sum(1) / kept.sum() if combine == "mean" else share.amax(1)
    m = torch.where(kept.any(), m, 1.0)  # no unit left: uniform

    if sharpness != 1.0:
        m = (m / m.amax()) ** sharpness  # relative to the peak, so that no power overflows
    m = torch.where(valid, m.reshape(valid.shape), 0.0)
    if smooth:
        m = torch.where(valid, _binomial_sum(m) / _binomial_sum(valid.double()), 0.0)

    w = (1.0 - strength) + strength * (m / (m.sum() / count))
    if clamp is not None:
        w = w.clamp(*clamp)
    w = torch.where(valid, w, 0.0)
    return torch.where(valid, w / (w.sum() / count), 0.0)


def _binomial_sum(grid: torch.Tensor) -> torch.Tensor:
    """Sum over the 3x3 neighbourhood with weights [1 2 1]ᵀ[1 2 1], zero beyond the border; [h, w] -> [h, w]."""
    padded = F.pad(grid, (1, 1, 1, 1))
    rows = padded[:, :-2] + 2.0 * padded[:, 1:-1] + padded[:, 2:]
    return rows[:-2] + 2.0 * rows[1:-1] + rows[2:]
