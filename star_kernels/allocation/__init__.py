"""From attention mass to the weights that move the advantage over the image, docs/method.md, section 4."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from star_kernels import backends
from star_kernels._checks import FLOATS, check_choice, check_number, check_tensor
from star_kernels._operators import operator
from star_kernels.allocation import cpu, reference
from star_kernels.allocation.temporal import temporal_weights as temporal_weights

KERNELS = ("cpu", "triton")
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS)


def allocation_map(
    mass: torch.Tensor,
    grid: Sequence[int],
    *,
    combine: str = "mean",
    sharpness: float = 1.0,
    smooth: bool = False,
    strength: float = 1.0,
    clamp: Sequence[float] | None = None,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Turn attention mass into weights with mean 1 over the token grid (docs/method.md, section 4).

    Each unit's mass is divided by its mean over the grid, the units are combined, sharpened, smoothed, mixed with the
    uniform map, clamped, and normalised. The weights say how many times its uniform share of the advantage a
    position gets: 1 everywhere is Flow-GRPO.

    Args:
        mass: [B, h·w, K] fp32, bf16, fp16 or float64, values >= 0; row-major over the grid, unit by unit. Only
            proportions within a unit matter. It is not differentiated: a mass that requires grad is detached.
        grid: (h, w), the image tokens per column and per row.
        combine: "mean" or "max" over the units that have mass. A unit without mass at the valid positions drops out.
        sharpness: γ >= 0, the power that the combined map is raised to. 0 makes it uniform.
        smooth: apply the 3x3 binomial filter [1 2 1]ᵀ[1 2 1]/16 after sharpening. Weights of the filter that fall
            outside the grid or on invalid positions are left out, and the others scaled up in their place.
        strength: λ in [0, 1], from the uniform map (0) to the whole effect of the mass (1).
        clamp: (w_min, w_max) with 0 <= w_min <= 1 <= w_max; w_max may be infinite. It acts before the last
            normalisation: the weights returned lie in [w_min/c, w_max/c], c being the mean after clamping, so that
            the largest is at most w_max/w_min times the smallest, while a single weight can pass w_max where the
            clamp cut off much (c < 1), or fall below w_min where it filled up much (c > 1).
        mask: [B, h, w] bool, or 0 and 1 in an integer or floating dtype: the valid positions, None for all. Mass
            elsewhere is ignored, whatever it is, and the weight there is 0.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        Weights [B, h, w] >= 0, fp32 (float64 for a float64 mass), whose mean over the valid positions of each sample
        is 1. Exactly 1 at every valid position where the strength is 0 or no unit has mass; 0 throughout for a
        sample without valid positions. A sample's weights do not depend on the rest of the batch.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong rank, shape, device or choice, a size of zero, a number outside its range; on the CPU also a
            mass that is negative, NaN or infinite at a valid position, or whose sum over them is infinite in float64,
            and a mask with values other than 0 and 1. On a GPU values are not looked at, since that would wait for the
            device: a mass or a sum that is not finite makes NaN of its sample's weights.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    check_tensor("mass", mass, ("B", "h·w", "K"))
    height, width = _check_grid(grid)
    if mass.shape[1] != height * width:
        raise ValueError(
            f"mass: expected shape [B, {height * width}, K] for grid {height}x{width}, got {list(mass.shape)}"
        )
    check_choice("combine", combine, ("mean", "max"))
    sharpness = check_number("sharpness", sharpness, low=0.0)
    if not isinstance(smooth, bool):
        raise TypeError(f"smooth: expected a bool, got {type(smooth).__name__}")
    strength = check_number("strength", strength, low=0.0, high=1.0)
    limits = None if clamp is None else _check_clamp(clamp)
    if mask is not None:
        check_tensor("mask", mask, (mass.shape[0], height, width), dtypes=_MASK_DTYPES, device=mass.device)
        mask = mask.detach()
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a str, got {type(backend).__name__}")
    return _allocation_map(mass.detach(), height, width, combine, sharpness, smooth, strength, limits, mask, backend)


def _check_grid(grid: Sequence[int]) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"grid: expected a pair (h, w), got {grid!r}")
    for size in grid:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"grid: expected two integers (h, w), got {grid!r}")
        if size <= 0:
            raise ValueError(f"grid: expected positive sizes (h, w), got {grid!r}")
    return grid[0], grid[1]


def _check_clamp(clamp: Sequence[float]) -> list[float]:
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
        raise TypeError(f"clamp: expected a pair (w_min, w_max) or None, got {clamp!r}")
    low, high = clamp
    low = check_number("clamp", low, low=0.0, high=1.0)
    if high != math.inf:
        high = check_number("clamp", high, low=1.0)
    return [low, high]


def _fake(
    mass: torch.Tensor,
    height: int,
    width: int,
    combine: str,
    sharpness: float,
    smooth: bool,
    strength: float,
    clamp: Sequence[float] | None,
    mask: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    dtype = torch.float64 if mass.dtype == torch.float64 else torch.float32
    return mass.new_empty((mass.shape[0], height, width), dtype=dtype)


@operator("allocation_map", fake=_fake)
def _allocation_map(
    mass: torch.Tensor,
    height: int,
    width: int,
    combine: str,
    sharpness: float,
    smooth: bool,
    strength: float,
    clamp: Sequence[float] | None,
    mask: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    chosen = backends.resolve_backend("allocation_map", backend, mass.device, KERNELS)
    if mask is not None and mask.dtype != torch.bool:
        _check_mask_values(mask)
        mask = mask != 0
    if chosen != "cpu":
        _check_mass_values(mass, mask)
    return _implementation(chosen)(
        mass,
        (height, width),
        combine=combine,
        sharpness=sharpness,
        smooth=smooth,
        strength=strength,
        clamp=None if clamp is None else (clamp[0], clamp[1]),
        mask=mask,
    )


def _implementation(chosen: str) -> Callable[..., torch.Tensor]:
    if chosen == "triton":
        from star_kernels.allocation import triton_kernels

        return triton_kernels.allocation_map
    return cpu.allocation_map if chosen == "cpu" else reference.allocation_map


def _check_mask_values(mask: torch.Tensor) -> None:
    if mask.device.type == "cpu" and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"mask: expected 0 or 1 everywhere, got {mask[(mask != 0) & (mask != 1)][0].item()}")


def _check_mass_values(mass: torch.Tensor, mask: torch.Tensor | None) -> None:
    # The C++ kernel makes the same check in its first pass over the mass.
    if mass.device.type != "cpu":
        return
    bad = ~((mass >= 0) & mass.isfinite())
    if mask is not None:
        bad &= mask.flatten(1).unsqueeze(2)
    if bool(bad.any()):
        sample, position, unit = bad.nonzero()[0].tolist()
        raise ValueError(
            f"mass: expected finite values >= 0, got {mass[sample, position, unit].item()} "
            f"at sample {sample}, position {position}, unit {unit}"
        )
    valid = mass.double() if mask is None else torch.where(mask.flatten(1).unsqueeze(2), mass.double(), 0.0)
    overflowing = valid.sum(1).isinf().any(1)
    if bool(overflowing.any()):
        sample = int(overflowing.nonzero()[0])
        raise ValueError(
            f"mass: expected values whose sum over positions is finite, got a sum of inf in sample {sample}"
        )
