"""The Gaussian transition inside Triton kernels, shared by transition and policy_loss (docs/method.md, section 2).

A program takes a tile [CP, BLOCK]: every channel, padded to a power of two, of BLOCK positions of one sample. Which
positions those are depends on the shape of a sample alone.

A ratio is exactly 1 on policy only if every kernel computes the same bits for a log-prob, whichever layout Triton
chooses for its tile. Two things see to that: sums are trees in which each node adds two numbers (`channel_sum`,
`position_sum`), and `OPTIONS` forbids the compiler to contract products and sums into fused multiply-adds, which it
would do or leave by context. Neither costs anything where memory binds.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Compiled for sm_90, the loss with KL in bf16 takes 49 instructions per element and lane with a tile of 1024 and one
# warp. With 2048 and four warps, which meet in shared memory for every sum over channels, it takes 85: on 132 SMs at
# 1.83 GHz issuing them for [256, 16, 64, 64] would last 46 µs, the memory 50. With 512 and one warp it takes 67; 2048
# and one warp fill the registers. More than 128 positions, as few channels would have, spill with everything on.
_TILE = 1024
_FEWEST_POSITIONS, _MOST_POSITIONS = 16, 128
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}

_HALF_LOG_TWO_PI = tl.constexpr(0.5 * math.log(2 * math.pi))
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Latent(NamedTuple):
    """A tensor [B, C, H, W] and its strides; if it is flat, `column` leads from any position to the next."""

    data: Tensor
    sample: int
    channel: int
    row: int
    column: int


class Row(NamedTuple):
    """A tensor [B] and its stride, which is 0 where one number serves every sample."""

    data: Tensor
    stride: int


def row(tensor: Tensor) -> Row:
    return Row(tensor, tensor.stride(0))


def latents(**tensors: Tensor | None) -> tuple[dict[str, Any], bool]:
    """The tensors as `Latent`s, and whether all are flat: H and W are one dimension, and 32 bits span a sample."""
    strides = {name: _position_stride(tensor) for name, tensor in tensors.items() if tensor is not None}
    flat = None not in strides.values()
    views: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            views[name] = None
        elif flat:
            column: Any = strides[name]
            if column == tensor.shape[1]:
                # Channels last. Of a number that is not a constant Triton knows only whether 16 divides it, and would
                # read 4 or 8 channels one by one.
                column = tl.constexpr(column)
            views[name] = Latent(tensor, tensor.stride(0), tensor.stride(1), 0, column)
        else:
            views[name] = Latent(tensor, *tensor.stride())
    return views, flat


def _position_stride(tensor: Tensor) -> int | None:
    _, channels, height, width = tensor.shape
    _, channel, row_stride, column = tensor.stride()
    if width == 1:
        column = row_stride
    elif height > 1 and row_stride != width * column:
        return None
    span = (channels - 1) * channel + (height * width - 1) * column
    return column if span < 2**31 else None


def tiling(shape: torch.Size, dtype: torch.dtype) -> tuple[int, dict[str, Any]]:
    """Tiles per sample of latents of that shape, and the constants of a kernel that computes on them in `dtype`."""
    _, channels, height, width = shape
    padded = triton.next_power_of_2(channels)
    block = min(max(_TILE // padded, _FEWEST_POSITIONS), _MOST_POSITIONS)
    constants = {"C": channels, "CP": padded, "BLOCK": block, "COMPUTE": _TYPES[dtype]}
    return triton.cdiv(height * width, block), constants


@triton.jit
def channel_sum(values):
    """[CP, BLOCK] -> [BLOCK], in an order that no layout changes."""
    for _ in tl.static_range(16):
        if values.shape[0] > 1:
            values = tl.sum(tl.reshape(values, [2, values.shape[0] // 2, values.shape[1]]), 0)
    return tl.reshape(values, [values.shape[1]])


@triton.jit
def position_sum(values):
    """[BLOCK] -> a scalar, in an order that no layout changes."""
    for _ in tl.static_range(16):
        if values.shape[0] > 2:
            values = tl.sum(tl.reshape(values, [2, values.shape[0] // 2]), 0)
    return tl.sum(values, 0)


@triton.jit
def load_tile(
    latent,
    sample,
    positions,
    inside,
    width,
    C: tl.constexpr,
    CP: tl.constexpr,
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """[CP, BLOCK] of a sample; 0 where there is no channel or position."""
    channels = tl.arange(0, CP)[:, None]
    start = latent.data + sample.to(tl.int64) * latent.sample
    if FLAT:
        offsets = channels * latent.channel + (positions * latent.column)[None, :]
    else:
        rows, columns = (positions // width).to(tl.int64), (positions % width).to(tl.int64)
        offsets = channels.to(tl.int64) * latent.channel + (rows * latent.row + columns * latent.column)[None, :]
    return tl.load(start + offsets, mask=(channels < C) & inside[None, :], other=0.0).to(COMPUTE)


@triton.jit
def load_velocity(
    conditional,
    unconditional,
    guidance_scale,
    sample,
    positions,
    inside,
    width,
    C: tl.constexpr,
    CP: tl.constexpr,
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """v [CP, BLOCK] with guidance: v_u + g·(v_c − v_u), or v_c where there is no v_u."""
    velocity = load_tile(conditional, sample, positions, inside, width, C, CP, FLAT, COMPUTE)
    if unconditional is not None:
        base = load_tile(unconditional, sample, positions, inside, width, C, CP, FLAT, COMPUTE)
        velocity = base + tl.full([], guidance_scale, COMPUTE) * (velocity - base)
    return velocity


@triton.jit
def store_tile(
    target,
    values,
    sample,
    positions,
    inside,
    size,
    C: tl.constexpr,
    CP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr = False,
):
    """Values in the dtype of `target`, a [B, C, H, W] of `size` positions, contiguous or channels_last."""
    channels = tl.arange(0, CP)[:, None]
    start = target + sample.to(tl.int64) * C * size
    offsets = channels + positions[None, :] * C if CHANNELS_LAST else channels * size + positions[None, :]
    tl.store(start + offsets, values, mask=(channels < C) & inside[None, :])


@triton.jit
def log_prob(deviation, std, C: tl.constexpr):
    """logp_i [BLOCK] of the deviation x' − μ [CP, BLOCK], which is 0 in the channels that pad."""
    scale = -1.0 / (2.0 * C * std * std)
    offset = -tl.log(std) - _HALF_LOG_TWO_PI
    return channel_sum(deviation * deviation) * scale + offset
