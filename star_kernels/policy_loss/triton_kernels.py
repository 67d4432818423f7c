"""The spatially resolved objective on a GPU, with its gradient in the same pass (docs/method.md, section 5).

Floor. Per latent entry one read of v, x and x', of v_u, v_ref and v_old where given, and one write of ∂loss/∂v: 4 to 7
entries of 2 or 4 bytes. Per position old_log_prob and the mask; the map is read once per token. Against that stand
about 20 operations per entry and 60 per position, so memory binds: [256, 16, 64, 64] in bf16 without KL moves 138 MB,
41 µs at 3.35 TB/s.

Design. One program per tile of a sample (`_gaussian_kernels`) reads it once, holds x' − μ in registers while the
channels are summed, and writes the gradient from there. A program's sums go to its own column of a small matrix; a
last kernel with one program per metric adds them up in a fixed order. Nothing is read back to the host, no float is
added atomically.

The positions of a mask have to be counted before the first gradient can be scaled: `_share_kernel`. The ratio of an
image needs the weighted sum over its positions first: `_image_sums_kernel` reads everything and writes sums only,
`_image_kernel` reads it again and writes the gradient. Nothing of the size of a latent is left behind but that.

The gradient is right for an incoming gradient of 1. `_scale_kernel` reads the incoming one on the device, and returns
without a second pass where it is 1, unless it writes another tensor: the float16 gradient of one kept in float32 for
its range, or that of a graph that is kept.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._gaussian import TransitionCoefficients, compute_dtype
from .._gaussian_kernels import (
    OPTIONS,
    Latent,
    Row,
    channel_sum,
    latents,
    layout,
    load_row,
    load_tile,
    load_velocity,
    log_prob,
    place,
    position_sum,
    row,
    rows_or_numbers,
    store_tile,
)
from .._kernel_calls import KernelCall, launch
from .._triton import cast
from . import reference
from .checks import checked
from .reference import LOG_RATIO_LIMIT, METRICS, WEIGHTED_ADVANTAGE_LIMIT

# Rows of the partial sums: the metrics in their order, then what only the kernels need.
_POLICY = tl.constexpr(0)
_KL = tl.constexpr(1)
_CLIPPED = tl.constexpr(2)
_RATIO = tl.constexpr(3)
_RATIO_MIN = tl.constexpr(4)
_RATIO_MAX = tl.constexpr(5)
_SQUARED = tl.constexpr(6)
_NON_FINITE = tl.constexpr(7)
_DIVERGENCE = tl.constexpr(8)
_INCLUDED = tl.constexpr(9)
_LOG_RATIO = tl.constexpr(10)
_SQUARED_WEIGHT = tl.constexpr(11)
_COUNTED = tl.constexpr(12)
_ROWS = 13

_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
_WEIGHTED_LIMIT = tl.constexpr(WEIGHTED_ADVANTAGE_LIMIT)
_INFINITY = tl.constexpr(float("inf"))
_ROOT_HALF = tl.constexpr(math.sqrt(0.5))

# Tiles of a sample whose sums a program of an image adds at a time, and columns that a program of the metrics does:
# these are few programs with nothing to hide a read behind. Positions of a mask and entries of a gradient at a time.
_SUMS = 256
_COLUMNS, _COLUMNS_WARPS = 8192, 16
_MASK_BLOCK, _SCALE_BLOCK, _WIDE_WARPS = 2048, 4096, 4


class _Inputs(NamedTuple):
    """The tensors of a call, latents in the order of `reference.LATENTS`. For those that are None no code is made."""

    velocity: Latent
    sample: Latent
    next_sample: Latent
    reference_velocity: Latent | None
    unconditional_velocity: Latent | None
    old_velocity: Latent | None
    old_log_prob: Tensor  # [B, H, W]
    weights: Tensor | None  # [B, h, w]
    mask: Tensor | None  # [B, H, W]
    share: Tensor | None  # [B], 1 / number of valid positions, with a mask
    advantage: Row
    sample_drift: Row
    velocity_scale: Row
    std: Row
    kl_std: Row | None  # that of the velocity, |b|·√½, where it is None


class _Rules(NamedTuple):
    """What is done where; what is in capitals is constant."""

    tokens_per_row: int
    PATCH_H: Any  # positions of a token
    PATCH_W: Any
    GUARDS: Any  # whether the objective is guard,
    DROPS: Any  # or dppo
    CHANNELS_LAST: Any  # whether the gradient is


@triton.jit
def _load_scalars(inputs, sample, layout):
    """Of a sample: A, a − 1, b, s, what the KL is divided by twice the square of, and 1 / number of valid positions."""
    advantage = load_row(inputs.advantage, sample, layout)
    drift = load_row(inputs.sample_drift, sample, layout)
    scale = load_row(inputs.velocity_scale, sample, layout)
    std = load_row(inputs.std, sample, layout)
    kl_std = tl.abs(scale) * _ROOT_HALF if inputs.kl_std is None else load_row(inputs.kl_std, sample, layout)
    share = 1.0 / tl.full([], layout.size, layout.COMPUTE)
    if inputs.share is not None:
        share = tl.load(inputs.share + sample)
    return advantage, drift, scale, std, kl_std, share


@triton.jit
def _terms(inputs, sample, positions, layout, rules, guidance_scale, scalars):
    """x' − μ, μ − μ_ref [CP, BLOCK]; log-ratio, KL, divergence and weight, valid and counted [BLOCK].

    Where there is no reference velocity, the second is not to be used. If it `GUARDS`, the first is x' − μ_old. What
    stands between them and the last two is 0 where not counted.
    """
    advantage, sample_drift, b, std, kl_std, _ = scalars
    inside = positions < layout.size
    x = load_tile(inputs.sample, sample, positions, layout)
    y = load_tile(inputs.next_sample, sample, positions, layout)
    # What a tile was made of is not held when the next is read: with guard, registers are short.
    if inputs.old_velocity is not None:
        old = load_tile(inputs.old_velocity, sample, positions, layout)
    if rules.GUARDS:
        deviation = (y - x) - (sample_drift * x + b * old)
    velocity = load_velocity(inputs.velocity, inputs.unconditional_velocity, guidance_scale, sample, positions, layout)
    index = sample.to(tl.int64) * layout.size + positions
    divergence = tl.full(positions.shape, 0.0, layout.COMPUTE)
    if inputs.old_velocity is not None:
        move = b * (velocity - old)
        divergence = channel_sum(move * move) * (1.0 / (2.0 * layout.C * std * std))
    if rules.GUARDS:
        log_ratio = channel_sum(deviation * move) * (1.0 / (layout.C * std))
    else:
        deviation = (y - x) - (sample_drift * x + b * velocity)
        old_log_prob = tl.load(inputs.old_log_prob + index, mask=inside, other=0.0).to(layout.COMPUTE)
        log_ratio = log_prob(deviation, std, layout.C) - old_log_prob
    drift = deviation
    kl = tl.full(positions.shape, 0.0, layout.COMPUTE)
    if inputs.reference_velocity is not None:
        drift = b * (velocity - load_tile(inputs.reference_velocity, sample, positions, layout))
        kl = channel_sum(drift * drift) * (1.0 / (2.0 * layout.C * kl_std * kl_std))
    weight = tl.full(positions.shape, 1.0, layout.COMPUTE)
    if inputs.weights is not None:
        rows, columns = positions // layout.width, positions % layout.width
        token = rows // rules.PATCH_H * rules.tokens_per_row + columns // rules.PATCH_W
        start = inputs.weights + sample.to(tl.int64) * (layout.size // (rules.PATCH_H * rules.PATCH_W))
        weight = tl.load(start + token, mask=inside, other=0.0).to(layout.COMPUTE)
    valid = inside
    if inputs.mask is not None:
        valid = tl.load(inputs.mask + index, mask=inside, other=0) != 0

    bounded = tl.abs(advantage * weight) < _WEIGHTED_LIMIT
    finite = (tl.abs(log_ratio) < _INFINITY) & (tl.abs(kl) < _INFINITY) & bounded
    if inputs.old_velocity is not None:
        finite = finite & (divergence < _INFINITY)
    counted = valid & finite
    log_ratio = tl.where(counted, log_ratio, 0.0)
    kl = tl.where(counted, kl, 0.0)
    divergence = tl.where(counted, divergence, 0.0)
    weight = tl.where(counted, weight, 0.0)
    return deviation, drift, log_ratio, kl, divergence, weight, valid, counted


@triton.jit
def _clamp(log_ratio):
    return tl.minimum(tl.maximum(log_ratio, -_LIMIT), _LIMIT)


@triton.jit
def _policy(log_ratio, advantage, low, high, divergence, limit, DROPS: tl.constexpr):
    """Clamped log-ratio, ratio, policy term, whether the ratio is out of its range, and −A·ρ where that has a slope.

    The last is the derivative of the policy term with respect to the log-prob. If it `DROPS`, nothing is clipped, and
    out is what has moved as far as the limit and would go further.
    """
    clamped = _clamp(log_ratio)
    ratio = tl.exp(clamped)
    unclipped = -advantage * ratio
    if DROPS:
        outward = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
        outside = outward & (divergence >= limit)
        policy = tl.where(outside, 0.0, unclipped)
        slope = policy
    else:
        outside = (ratio < low) | (ratio > high)
        policy = tl.maximum(unclipped, -advantage * tl.minimum(tl.maximum(ratio, low), high))
        slope = tl.where(unclipped >= policy, unclipped, 0.0)
    return clamped, ratio, policy, outside, tl.where(tl.abs(log_ratio) <= _LIMIT, slope, 0.0)


@triton.jit
def _store_gradient(
    gradient,
    inputs,
    sample,
    positions,
    layout,
    rules,
    batch,
    guidance_scale,
    kl_weight,
    scalars,
    pull,
    deviation,
    drift,
    counted,
):
    """∂loss/∂v of a tile; `pull` is [1, BLOCK]."""
    _, _, b, std, kl_std, share = scalars
    scale = std if rules.GUARDS else std * std
    grad_mean = (pull * (1.0 / scale)) * deviation
    if inputs.reference_velocity is not None:
        grad_mean += (tl.full([], kl_weight, layout.COMPUTE) / (kl_std * kl_std)) * drift
    factor = tl.full([], guidance_scale, layout.COMPUTE) * b * share / (batch * layout.C)
    # A product would not do: zero times a deviation that is NaN is NaN.
    values = tl.where(counted[None, :], factor * grad_mean, 0.0)
    store_tile(gradient, cast(values, gradient.dtype.element_ty), sample, positions, layout, rules.CHANNELS_LAST)


@triton.jit(do_not_specialize=["batch"])
def _position_kernel(
    inputs,
    gradient,
    partials,
    layout,
    rules,
    batch,
    guidance_scale: tl.float64,
    kl_weight: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    divergence_limit: tl.float64,
):
    sample, positions = place(layout)
    scalars = _load_scalars(inputs, sample, layout)
    deviation, drift, log_ratio, kl, divergence, weight, valid, counted = _terms(
        inputs, sample, positions, layout, rules, guidance_scale, scalars
    )
    advantage = tl.where(counted, scalars[0], 0.0)
    low, high = tl.full([], 1.0 - clip_low, layout.COMPUTE), tl.full([], 1.0 + clip_high, layout.COMPUTE)
    limit = tl.full([], divergence_limit, layout.COMPUTE)
    clamped, ratio, policy, outside, slope = _policy(log_ratio, advantage, low, high, divergence, limit, rules.DROPS)
    if gradient is not None:
        _store_gradient(
            gradient,
            inputs,
            sample,
            positions,
            layout,
            rules,
            batch,
            guidance_scale,
            kl_weight,
            scalars,
            (weight * slope)[None, :],
            deviation,
            drift,
            counted,
        )
    share = scalars[5]
    sums, stride = partials + tl.program_id(0), tl.num_programs(0)
    tl.store(sums + _POLICY * stride, position_sum(weight * policy) * share)
    tl.store(sums + _KL * stride, position_sum(kl) * share)
    tl.store(sums + _CLIPPED * stride, tl.sum((counted & outside).to(layout.COMPUTE), 0))
    tl.store(sums + _RATIO * stride, position_sum(tl.where(counted, ratio, 0.0)))
    tl.store(sums + _RATIO_MIN * stride, tl.min(tl.where(counted, ratio, _INFINITY), 0))
    tl.store(sums + _RATIO_MAX * stride, tl.max(tl.where(counted, ratio, -_INFINITY), 0))
    tl.store(sums + _SQUARED * stride, position_sum(clamped * clamped))
    tl.store(sums + _NON_FINITE * stride, tl.sum((valid & ~counted).to(layout.COMPUTE), 0))
    tl.store(sums + _DIVERGENCE * stride, position_sum(divergence) * share)
    tl.store(sums + _INCLUDED * stride, tl.sum(counted.to(layout.COMPUTE), 0))


@triton.jit
def _image_sums_kernel(inputs, partials, layout, rules, guidance_scale: tl.float64):
    sample, positions = place(layout)
    scalars = _load_scalars(inputs, sample, layout)
    _, _, log_ratio, kl, divergence, weight, valid, counted = _terms(
        inputs, sample, positions, layout, rules, guidance_scale, scalars
    )
    sums, stride = partials + tl.program_id(0), tl.num_programs(0)
    tl.store(sums + _KL * stride, position_sum(kl) * scalars[5])
    tl.store(sums + _DIVERGENCE * stride, position_sum(divergence) * scalars[5])
    tl.store(sums + _NON_FINITE * stride, tl.sum((valid & ~counted).to(layout.COMPUTE), 0))
    tl.store(sums + _LOG_RATIO * stride, position_sum(weight * _clamp(log_ratio)))
    tl.store(sums + _SQUARED_WEIGHT * stride, position_sum(weight * weight))
    tl.store(sums + _COUNTED * stride, tl.sum(counted.to(layout.COMPUTE), 0))


@triton.jit
def _sum_of_tiles(sums, tiles, SUMS: tl.constexpr):
    """What the tiles of a sample left at `sums`, added up."""
    total = tl.full([SUMS], 0.0, sums.dtype.element_ty)
    for first in range(0, tiles, SUMS):
        tile = first + tl.arange(0, SUMS)
        total += tl.load(sums + tile, mask=tile < tiles, other=0.0)
    return position_sum(total)


@triton.jit(do_not_specialize=["batch"])
def _image_kernel(
    inputs,
    gradient,
    partials,
    layout,
    rules,
    batch,
    guidance_scale: tl.float64,
    kl_weight: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    divergence_limit: tl.float64,
    SUMS: tl.constexpr,
):
    sample, positions = place(layout)
    scalars = _load_scalars(inputs, sample, layout)
    share = scalars[5]
    stride = tl.num_programs(0)
    first = partials + sample * layout.tiles
    log_ratio = _sum_of_tiles(first + _LOG_RATIO * stride, layout.tiles, SUMS) * share
    squares = _sum_of_tiles(first + _SQUARED_WEIGHT * stride, layout.tiles, SUMS)
    number = _sum_of_tiles(first + _COUNTED * stride, layout.tiles, SUMS)
    included = (number > 0) & (tl.abs(log_ratio) < _INFINITY) & (squares < _INFINITY)
    # In double precision, so that weights of 1 leave the bounds as they are.
    spread = tl.sqrt(squares.to(tl.float64) / tl.maximum(number, 1.0).to(tl.float64))
    low, high = (1.0 - clip_low * spread).to(layout.COMPUTE), (1.0 + clip_high * spread).to(layout.COMPUTE)
    divergence = tl.full([], 0.0, layout.COMPUTE)
    if rules.DROPS:
        divergence = _sum_of_tiles(first + _DIVERGENCE * stride, layout.tiles, SUMS)
    limit = tl.full([], divergence_limit, layout.COMPUTE)
    clamped, ratio, policy, outside, slope = _policy(log_ratio, scalars[0], low, high, divergence, limit, rules.DROPS)

    # An image is one entry of the metrics, which its first tile makes.
    mine = included & (tl.program_id(0) % layout.tiles == 0)
    sums = partials + tl.program_id(0)
    tl.store(sums + _POLICY * stride, tl.where(mine, policy, 0.0))
    tl.store(sums + _CLIPPED * stride, (mine & outside).to(layout.COMPUTE))
    tl.store(sums + _RATIO * stride, tl.where(mine, ratio, 0.0))
    tl.store(sums + _RATIO_MIN * stride, tl.where(mine, ratio, _INFINITY))
    tl.store(sums + _RATIO_MAX * stride, tl.where(mine, ratio, -_INFINITY))
    tl.store(sums + _SQUARED * stride, tl.where(mine, clamped * clamped, 0.0))
    tl.store(sums + _INCLUDED * stride, mine.to(layout.COMPUTE))
    # The first kernel took this tile's positions for finite ones.
    dropped = (number > 0) & (included == 0)
    counted_here = tl.load(sums + _COUNTED * stride, mask=dropped, other=0.0)
    non_finite = tl.load(sums + _NON_FINITE * stride, mask=dropped, other=0.0)
    tl.store(sums + _NON_FINITE * stride, non_finite + counted_here, mask=dropped)
    tl.store(sums + _KL * stride, tl.full([], 0.0, layout.COMPUTE), mask=dropped)
    # Another tile of this image may read it before or after: it leaves the image out in either case.
    tl.store(sums + _DIVERGENCE * stride, tl.full([], 0.0, layout.COMPUTE), mask=dropped)

    if gradient is not None:
        end = tl.where(included, layout.size, 0)  # of the positions that get a gradient
        deviation, drift, at_position, _, _, weight, _, counted = _terms(
            inputs, sample, positions, layout, rules, guidance_scale, scalars
        )
        pull = weight * tl.where(tl.abs(at_position) <= _LIMIT, slope, 0.0)
        _store_gradient(
            gradient,
            inputs,
            sample,
            positions,
            layout,
            rules,
            batch,
            guidance_scale,
            kl_weight,
            scalars,
            pull[None, :],
            deviation,
            drift,
            counted & (positions < end),
        )


@triton.jit
def _share_kernel(mask, share, size, BLOCK: tl.constexpr):
    start = mask + tl.program_id(0).to(tl.int64) * size
    count = tl.full([BLOCK], 0, tl.int32)
    for first in range(0, size, BLOCK):
        positions = first + tl.arange(0, BLOCK)
        count += (tl.load(start + positions, mask=positions < size, other=0) != 0).to(tl.int32)
    # A sample without a valid position has only zero terms; 1 keeps them from becoming 0/0.
    number = tl.maximum(tl.sum(count, 0), 1)
    tl.store(share + tl.program_id(0), 1.0 / number.to(share.dtype.element_ty))


@triton.jit
def _row_total(sums, columns, COLUMNS: tl.constexpr):
    total = tl.full([COLUMNS], 0.0, sums.dtype.element_ty)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        total += tl.load(sums + column, mask=column < columns, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _row_minimum(sums, sign, columns, COLUMNS: tl.constexpr):
    """The minimum of sign times the row."""
    lowest = tl.full([COLUMNS], _INFINITY, sums.dtype.element_ty)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        lowest = tl.minimum(lowest, sign * tl.load(sums + column, mask=column < columns, other=sign * _INFINITY))
    return tl.min(lowest, 0)


@triton.jit(do_not_specialize=["batch"])
def _metrics_kernel(partials, loss, metrics, batch, columns, kl_weight: tl.float64, COLUMNS: tl.constexpr):
    """Program k writes metric k; the first one writes the loss too."""
    metric = tl.program_id(0)
    number = _row_total(partials + _INCLUDED * columns, columns, COLUMNS)
    divisor = tl.maximum(number, 1.0)
    row = partials + metric * columns
    if metric == _RATIO_MIN:
        value = _row_minimum(row, 1.0, columns, COLUMNS)
    elif metric == _RATIO_MAX:
        value = -_row_minimum(row, -1.0, columns, COLUMNS)
    else:
        value = _row_total(row, columns, COLUMNS)
    if (metric <= _KL) | (metric == _DIVERGENCE):
        value = value / batch
    elif metric == _SQUARED:
        value = value / (2.0 * divisor)
    elif (metric == _CLIPPED) | (metric == _RATIO):
        value = value / divisor
    if (metric >= _RATIO) & (metric <= _RATIO_MAX):
        value = tl.where(number > 0, value, 1.0)
    tl.store(metrics + metric, value)
    if metric == _POLICY:
        kl = _row_total(partials + _KL * columns, columns, COLUMNS) / batch
        tl.store(loss, value + tl.full([], kl_weight, kl.dtype) * kl)


@triton.jit
def _scale_kernel(gradient, scaled, scale, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(scale)
    if IN_PLACE & (factor == 1):
        return
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(gradient + index, mask=index < size) * factor
    tl.store(scaled + index, cast(values, scaled.dtype.element_ty), mask=index < size)


def policy_loss(inputs: reference.Inputs, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss [], its metrics [9], and its gradient as `reference.empty_gradient` has it or, unasked for, [0].

    What can be told of the arguments without their values need not have been checked, but for the coefficients.
    """
    return launch(prepare, *_arguments(inputs, with_gradient))


def scale_gradient(gradient: Tensor, scale: Tensor, scaled: Tensor) -> Tensor:
    """Writes the gradient of `policy_loss` times the tensor `scale` [] to `scaled`, which lies in memory like it.

    They may be the same tensor; no pass is then made where the scale is 1.
    """
    return launch(prepare_scale, (gradient, scale, None if scaled is gradient else scaled))


def _arguments(inputs: reference.Inputs, with_gradient: bool) -> tuple[tuple[Any, ...], tuple[float, ...]]:
    """What `prepare` takes: the fields of `inputs`, with rows in the place of the coefficients, and their numbers."""
    dense = [None if tensor is None else tensor.contiguous() for tensor in (*inputs[3:4], *inputs[6:8])]
    c = inputs.coefficients
    kl: Any = c.noise_rate if inputs.kl_scale == "std_dev" else c.std
    rows, numbers = rows_or_numbers((c.sample_drift, c.velocity_scale, c.std, kl), inputs.tensors())
    return (*inputs[:3], dense[0], inputs.advantage, *rows, *dense[1:], *inputs[8:], with_gradient), numbers


def prepare(*arguments: Any) -> tuple[tuple[Tensor, Tensor, Tensor], list[KernelCall]]:
    """What `policy_loss` returns, not yet written, and the kernels that write it, after checking the arguments."""
    *given, with_gradient = arguments[:22]
    rows = arguments[22:] or given[5:9]
    inputs = checked(reference.Inputs.from_flat(given))
    velocity, weights, mask = inputs.velocity, inputs.weights, inputs.mask
    batch, _, height, width = velocity.shape
    device = velocity.device
    dtype = compute_dtype(*inputs.tensors(), *rows)
    loss = torch.empty((), dtype=dtype, device=device)
    metrics = torch.empty(len(METRICS), dtype=dtype, device=device)
    gradient = reference.empty_gradient(velocity, dtype) if with_gradient else None
    views, flat = latents(*inputs.latents())
    divided = layout(velocity.shape, dtype, flat)
    columns = batch * divided.tiles
    partials = torch.empty((_ROWS, columns), dtype=dtype, device=device)
    share = None if mask is None else torch.empty(batch, dtype=dtype, device=device)
    scalars: list[Any] = [row(number) for number in (inputs.advantage, *rows)]
    if inputs.kl_scale == "velocity":
        scalars[-1] = None
    grid_height, grid_width = (height, width) if weights is None else weights.shape[1:]
    last = gradient is not None and not gradient.is_contiguous()
    constants = (
        height // grid_height,
        width // grid_width,
        inputs.objective == "guard",
        inputs.objective == "dppo",
        last,
    )
    shared: dict[str, Any] = {
        "inputs": _Inputs._make((*views, inputs.old_log_prob, weights, mask, share, *scalars)),
        "partials": partials,
        "layout": divided,
        "rules": _Rules(grid_width, *(tl.constexpr(constant) for constant in constants)),
        "guidance_scale": inputs.guidance_scale,
    }
    clip_low, clip_high = inputs.bounds()
    judged: dict[str, Any] = {
        **shared,
        "gradient": gradient,
        "batch": batch,
        "kl_weight": inputs.kl_weight,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "divergence_limit": inputs.divergence_limit,
    }
    programs = (columns,)
    calls = []
    if mask is not None:
        counting = {"mask": mask, "share": share, "size": height * width, "BLOCK": _MASK_BLOCK}
        calls.append(KernelCall("mask", _share_kernel, (batch,), counting, OPTIONS | {"num_warps": _WIDE_WARPS}))
    if inputs.granularity == "position":
        calls.append(KernelCall("position", _position_kernel, programs, judged, OPTIONS))
    else:
        calls.append(KernelCall("image, sums", _image_sums_kernel, programs, shared, OPTIONS))
        calls.append(KernelCall("image", _image_kernel, programs, judged | {"SUMS": _SUMS}, OPTIONS))
    adding: dict[str, Any] = {
        "partials": partials,
        "loss": loss,
        "metrics": metrics,
        "batch": batch,
        "columns": columns,
        "kl_weight": inputs.kl_weight,
        "COLUMNS": _COLUMNS,
    }
    options = OPTIONS | {"num_warps": _COLUMNS_WARPS}
    calls.append(KernelCall("metrics", _metrics_kernel, (len(METRICS),), adding, options))
    return (loss, metrics, torch.empty(0, dtype=dtype, device=device) if gradient is None else gradient), calls


def prepare_scale(gradient: Tensor, scale: Tensor, scaled: Tensor | None) -> tuple[Tensor, list[KernelCall]]:
    """The kernel of `scale_gradient`, which writes to `gradient` itself where `scaled` is None."""
    target = gradient if scaled is None else scaled
    arguments = {
        "gradient": gradient,
        "scaled": target,
        "scale": scale,
        "size": gradient.numel(),
        "IN_PLACE": scaled is None,
        "BLOCK": _SCALE_BLOCK,
    }
    programs = (triton.cdiv(gradient.numel(), _SCALE_BLOCK),)
    call = KernelCall("scale", _scale_kernel, programs, arguments, OPTIONS | {"num_warps": _WIDE_WARPS})
    return target, [call]


def ahead_of_time_calls(architecture: str) -> list[KernelCall]:
    """Every kernel on tensors without memory, to be compiled; one configuration serves all architectures."""
    plain, last = torch.contiguous_format, torch.channels_last
    calls: dict[str, KernelCall] = {}
    for problem, inputs in {
        "bf16, C 16": _without_memory(torch.bfloat16, 16, plain, "position"),
        "bf16, C 16, channels last": _without_memory(torch.bfloat16, 16, last, "position"),
        "fp32, C 32, guidance and mask": _without_memory(torch.float32, 32, plain, "position", everything=True),
        "fp32, C 4, channels last, guidance and mask": _without_memory(
            torch.float32, 4, last, "position", everything=True
        ),
        "fp32, C 32, guidance, mask and guard": _without_memory(
            torch.float32, 32, plain, "position", everything=True, objective="guard"
        ),
        "bf16, C 16, dppo": _without_memory(torch.bfloat16, 16, plain, "position", objective="dppo"),
        "image, bf16, C 16": _without_memory(torch.bfloat16, 16, plain, "image"),
        "image, bf16, C 16, dppo": _without_memory(torch.bfloat16, 16, plain, "image", objective="dppo"),
    }.items():
        (loss, _, gradient), made = prepare(*_arguments(inputs, with_gradient=True)[0])
        for call in made:
            on_latents = call.kernel not in (_share_kernel, _metrics_kernel)
            name = f"{call.name}, {problem.removeprefix('image, ')}" if on_latents else call.name
            calls.setdefault(name, replace(call, name=name))
        calls |= {call.name: call for call in prepare_scale(gradient, loss, None)[1]}
    return list(calls.values())


def _without_memory(
    dtype: torch.dtype,
    channels: int,
    memory_format: torch.memory_format,
    granularity: str,
    everything: bool = False,
    objective: str = "clip",
) -> reference.Inputs:
    """Arguments of the loss at 512 px; with a KL, and with guidance and a mask too if it is to be `everything`."""
    batch, height, width = 9, 64, 64

    def latent() -> Tensor:
        return torch.empty((batch, channels, height, width), dtype=dtype, device="meta", memory_format=memory_format)

    positions, scalars = torch.empty((batch, height, width), device="meta"), torch.empty(batch, device="meta")
    return reference.Inputs(
        *(latent(), latent(), latent()),
        old_log_prob=positions,
        advantage=scalars,
        coefficients=TransitionCoefficients(scalars, scalars, scalars),
        weights=torch.empty((batch, height // 2, width // 2), device="meta"),
        mask=positions.bool() if everything else None,
        objective=objective,
        old_velocity=None if objective == "clip" else latent(),
        divergence_limit=1e-5,
        granularity=granularity,
        reference_velocity=latent(),
        kl_weight=0.01,
        unconditional_velocity=latent() if everything else None,
        guidance_scale=4.5 if everything else 1.0,
    )
