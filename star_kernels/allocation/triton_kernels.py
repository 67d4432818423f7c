"""Mass to allocation map on a GPU, docs/method.md, section 4.

Floor. One read of the mass [N, K] and one write of the weights [N], N = h·w: 1.2 MB for 8 samples at 1024 px with 8
units, 0.4 µs at 3.35 TB/s. A sample is too small to be bound by anything but latency: of the sums over positions that
each step needs from the one before.

Design. One kernel with one program per sample, so that a step waits for a barrier and not for a launch. Between two
steps the map lies in scratch memory, which stays in the caches; from there too the mass is read a second time, to be
combined. The arithmetic is float64 like the reference's: for so few numbers it costs nothing that could be seen, the
mean is 1 to the rounding of the output, and no mass is too small, or too large while its sum is finite.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._kernel_calls import KernelCall, launch

# Entries of the mass and positions of the map at a time: at most 32 and 8 for each of the 256 threads of a program.
# Compiled so, nothing spills; with 512 threads for as many or for twice as many, or with half as many, something does.
_ENTRIES, _POSITIONS, _FEWEST_POSITIONS = 8192, 2048, 16
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _load_valid(mask, positions, inside):
    valid = inside
    if mask is not None:
        valid = tl.load(mask + positions, mask=inside, other=0) != 0
    return valid


@triton.jit
def _load_mass(mass, positions, valid, K: tl.constexpr, KP: tl.constexpr):
    """[TILE, KP] in float64, 0 where not valid."""
    units = tl.arange(0, KP)[None, :]
    there = valid[:, None] & (units < K)
    return tl.load(mass + positions[:, None] * K + units, mask=there, other=0.0).to(tl.float64)


@triton.jit
def _weight(scratch, positions, inside, mean, strength, low, high, CLAMP: tl.constexpr):
    """The weight before it is normalised; one that is NaN stays NaN."""
    weight = (1.0 - strength) + strength * (tl.load(scratch + positions, mask=inside, other=0.0) / mean)
    if CLAMP:
        weight = tl.where(weight < low, low, tl.where(weight > high, high, weight))
    return weight


@triton.jit
def _allocation_kernel(
    mass,
    mask,
    scratch,
    weights,
    height,
    width,
    sharpness: tl.float64,
    strength: tl.float64,
    low: tl.float64,
    high: tl.float64,
    K: tl.constexpr,
    KP: tl.constexpr,
    TILE: tl.constexpr,
    MAXIMUM: tl.constexpr,
    SHARPEN: tl.constexpr,
    SMOOTH: tl.constexpr,
    CLAMP: tl.constexpr,
):
    size = height * width
    sample = tl.program_id(0).to(tl.int64)
    mass += sample * size * K
    weights += sample * size
    scratch += sample * size * (2 if SMOOTH else 1)
    if mask is not None:
        mask += sample * size

    totals = tl.full([KP], 0.0, tl.float64)
    count = tl.full([], 0.0, tl.float64)
    for first in range(0, size, TILE):
        positions = first + tl.arange(0, TILE)
        valid = _load_valid(mask, positions, positions < size)
        totals += tl.sum(_load_mass(mass, positions, valid, K, KP), 0)
        count += tl.sum(valid.to(tl.float64), 0)

    # Dividing by the total instead of the mean, and adding instead of averaging, leaves out factors that all positions
    # share: the normalisation removes them anyway.
    kept = totals != 0
    divisors = tl.where(kept, totals, 1.0)  # not their reciprocals, which overflow for the least of numbers
    any_unit = tl.sum(kept.to(tl.int32), 0) > 0
    # NaN if a mass is not finite, else 0: maxima and comparisons lose a NaN.
    poison = tl.sum(totals - totals, 0)
    peak = tl.full([], 0.0, tl.float64)
    total = tl.full([], 0.0, tl.float64)
    for first in range(0, size, TILE):
        positions = first + tl.arange(0, TILE)
        valid = _load_valid(mask, positions, positions < size)
        values = _load_mass(mass, positions, valid, K, KP) / divisors[None, :]
        combined = tl.max(values, 1) if MAXIMUM else tl.sum(values, 1)
        combined = tl.where(valid, tl.where(any_unit, combined, 1.0), 0.0)
        tl.store(scratch + positions, combined, mask=positions < size)
        peak = tl.maximum(peak, tl.max(combined, 0))
        total += tl.sum(combined, 0)
    tl.debug_barrier()

    if SHARPEN:
        total = tl.full([], 0.0, tl.float64)
        of_zero = tl.where(tl.full([], sharpness, tl.float64) == 0, 1.0, 0.0).to(tl.float64)
        for first in range(0, size, TILE):
            positions = first + tl.arange(0, TILE)
            valid = _load_valid(mask, positions, positions < size)
            # Relative to the peak, so that no power overflows.
            base = tl.load(scratch + positions, mask=positions < size, other=0.0) / peak
            power = tl.exp2(tl.full([], sharpness, tl.float64) * tl.log2(tl.where(base > 0, base, 1.0)))
            power = tl.where(valid, tl.where(base > 0, power, of_zero), 0.0)
            tl.store(scratch + positions, power, mask=positions < size)
            total += tl.sum(power, 0)
        tl.debug_barrier()

    if SMOOTH:
        total = tl.full([], 0.0, tl.float64)
        for first in range(0, size, TILE):
            positions = first + tl.arange(0, TILE)
            inside = positions < size
            valid = _load_valid(mask, positions, inside)
            rows, columns = positions // width, positions % width
            blurred = tl.full([TILE], 0.0, tl.float64)
            within = tl.full([TILE], 0.0, tl.float64)
            for down in tl.static_range(-1, 2):
                for right in tl.static_range(-1, 2):
                    factor = (2 - down * down) * (2 - right * right)
                    there = (rows + down >= 0) & (rows + down < height)
                    there = there & (columns + right >= 0) & (columns + right < width) & inside
                    neighbours = positions + down * width + right
                    blurred += factor * tl.load(scratch + neighbours, mask=there, other=0.0)
                    within += factor * _load_valid(mask, neighbours, there).to(tl.float64)
            smooth = tl.where(valid, blurred / within, 0.0)
            tl.store(scratch + size + positions, smooth, mask=inside)
            total += tl.sum(smooth, 0)
        tl.debug_barrier()
        scratch += size

    mean = total / count + poison
    mixing = tl.full([], strength, tl.float64)
    total = tl.full([], 0.0, tl.float64)
    for first in range(0, size, TILE):
        positions = first + tl.arange(0, TILE)
        valid = _load_valid(mask, positions, positions < size)
        weight = _weight(scratch, positions, positions < size, mean, mixing, low, high, CLAMP)
        total += tl.sum(tl.where(valid, weight, 0.0), 0)
    final_mean = total / count
    for first in range(0, size, TILE):
        positions = first + tl.arange(0, TILE)
        inside = positions < size
        valid = _load_valid(mask, positions, inside)
        weight = _weight(scratch, positions, inside, mean, mixing, low, high, CLAMP) / final_mean
        tl.store(weights + positions, tl.where(valid, weight, 0.0).to(weights.dtype.element_ty), mask=inside)


def allocation_map(
    mass: Tensor,
    grid: tuple[int, int],
    *,
    combine: str,
    sharpness: float,
    smooth: bool,
    strength: float,
    clamp: tuple[float, float] | None,
    mask: Tensor | None,
) -> Tensor:
    """Like the reference. Values are not looked at: a mass that is not finite makes NaN of its sample's weights."""
    tensors = (mass.contiguous(), None if mask is None else mask.contiguous())
    return launch(prepare, (*tensors, *grid, combine, sharpness, smooth, strength, clamp))


def prepare(
    mass: Tensor,
    mask: Tensor | None,
    height: int,
    width: int,
    combine: str,
    sharpness: float,
    smooth: bool,
    strength: float,
    clamp: tuple[float, float] | None,
) -> tuple[Tensor, list[KernelCall]]:
    """The weights [B, h, w], not yet written, and the kernel that writes them, for contiguous tensors."""
    batch, _, units = mass.shape
    padded = triton.next_power_of_2(units)
    dtype = torch.float64 if mass.dtype == torch.float64 else torch.float32
    weights = torch.empty((batch, height, width), dtype=dtype, device=mass.device)
    scratch = torch.empty((batch, 2 if smooth else 1, height * width), dtype=torch.float64, device=mass.device)
    low, high = clamp or (0.0, 0.0)
    arguments: dict[str, Any] = {
        "mass": mass,
        "mask": mask,
        "scratch": scratch,
        "weights": weights,
        "height": height,
        "width": width,
        "sharpness": sharpness,
        "strength": strength,
        "low": low,
        "high": high,
        "K": units,
        "KP": padded,
        "TILE": min(max(_ENTRIES // padded, _FEWEST_POSITIONS), _POSITIONS),
        "MAXIMUM": combine == "max",
        "SHARPEN": sharpness != 1.0,
        "SMOOTH": smooth,
        "CLAMP": clamp is not None,
    }
    steps = ["sharpened"] * (sharpness != 1.0) + ["smoothed"] * smooth + ["clamped"] * (clamp is not None)
    name = ", ".join([combine, *steps])
    return weights, [KernelCall(name, _allocation_kernel, (batch,), arguments, _OPTIONS)]


def ahead_of_time_calls(architecture: str) -> list[KernelCall]:
    """The kernel's uses on tensors without memory, to be compiled; one configuration serves all architectures."""
    batch, height, width, units = 8, 32, 32, 8
    mass = torch.empty((batch, height * width, units), device="meta")
    mask = torch.empty((batch, height, width), dtype=torch.bool, device="meta")
    _, plain = prepare(mass, None, height, width, "mean", 1.0, False, 1.0, None)
    _, every = prepare(mass, mask, height, width, "max", 2.0, True, 0.5, (0.2, 5.0))
    return plain + every
