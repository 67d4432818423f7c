"""The Gaussian transition inside Triton kernels, shared by transition and policy_loss (docs/method.md, section 2).

A program takes a tile [CP, BLOCK]: every channel, padded to a power of two, of BLOCK positions of one sample. Which
positions those are depends on the shape of a sample alone.

A ratio is exactly 1 on policy only if every kernel computes the same bits for a log-prob, whichever layout Triton
chooses for its tile. Two things see to that: sums are trees in which each node adds two numbers (`channel_sum`,
`position_sum`), and `OPTIONS` forbids the compiler to contract products and sums into fused multiply-adds, which it
would do or leave by context. Neither costs anything where memory binds.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gaussian import compute_dtype

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
    """A tensor [B] and its stride, which is 0 where one number serves every sample; or that number and no stride."""

    data: Tensor | float
    stride: int | None


class Layout(NamedTuple):
    """How latents lie and are divided among programs; what is in capitals is constant."""

    size: int  # H·W
    width: int
    tiles: int  # of a sample
    C: Any  # channels
    CP: Any  # the power of two that they are padded to
    BLOCK: Any  # positions of a tile
    FLAT: Any  # whether H and W are one dimension
    COMPUTE: Any  # the dtype of the arithmetic


def row(data: Any) -> Row:
    """A tensor [B] or [1], or a number, as a `Row`."""
    if isinstance(data, Tensor):
        return Row(data, 0 if data.shape == (1,) else data.stride(0))
    return Row(data, None)


def rows_or_numbers(
    rows: tuple[Tensor, ...], others: Sequence[Tensor | None]
) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """`rows` as a kernel gets them that also reads `others`: single ones that are on the CPU as numbers.

    A GPU could not read them, and a copy would not be captured in a graph. A kernel takes numbers as float32.
    """
    if rows[0].is_cpu and rows[0].shape == (1,):
        if compute_dtype(*rows, *others) == torch.float32:
            return (None,) * len(rows), tuple(row.item() for row in rows)
        device = next(other.device for other in others if other is not None)
        rows = tuple(row.to(device) for row in rows)
    return rows, ()


def latents(*tensors: Tensor | None) -> tuple[list[Any], bool]:
    """The tensors as `Latent`s, and whether all are flat: H and W are one dimension, and 32 bits span a sample."""
    strides = [None if tensor is None else _position_stride(tensor) for tensor in tensors]
    flat = all(tensor is None or stride is not None for tensor, stride in zip(tensors, strides, strict=True))
    views: list[Any] = []
    for tensor, column in zip(tensors, strides, strict=True):
        if tensor is None:
            views.append(None)
        elif flat:
            # Channels last as a constant: of another number Triton knows only whether 16 divides it, and would read 4
            # or 8 channels one by one.
            constant: Any = tl.constexpr(column) if column == tensor.shape[1] else column
            views.append(Latent(tensor, tensor.stride(0), tensor.stride(1), 0, constant))
        else:
            views.append(Latent(tensor, *tensor.stride()))
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


def layout(shape: torch.Size, dtype: torch.dtype, flat: bool) -> Layout:
    """Of latents of that shape, which are `flat` or not, for a kernel that computes in `dtype`."""
    _, channels, height, width = shape
    padded = triton.next_power_of_2(channels)
    block = min(max(_TILE // padded, _FEWEST_POSITIONS), _MOST_POSITIONS)
    constants = (tl.constexpr(value) for value in (channels, padded, block, flat, _TYPES[dtype]))
    return Layout(height * width, width, triton.cdiv(height * width, block), *constants)


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
def load_row(row, sample, layout):
    """The number of a sample."""
    if row.stride is None:
        return tl.full([], row.data, layout.COMPUTE)
    else:
        return tl.load(row.data + sample * row.stride).to(layout.COMPUTE)


@triton.jit
def place(layout):
    """The sample of a program, and the positions of its tile [BLOCK], of which the last may be beyond the sample."""
    tile = tl.program_id(0) % layout.tiles
    return tl.program_id(0) // layout.tiles, tile * layout.BLOCK + tl.arange(0, layout.BLOCK)


@triton.jit
def load_tile(latent, sample, positions, layout):
    """[CP, BLOCK] of a sample; 0 where there is no channel or position."""
    channels = tl.arange(0, layout.CP)[:, None]
    start = latent.data + sample.to(tl.int64) * latent.sample
    if layout.FLAT:
        offsets = channels * latent.channel + (positions * latent.column)[None, :]
    else:
        rows, columns = (positions // layout.width).to(tl.int64), (positions % layout.width).to(tl.int64)
        offsets = channels.to(tl.int64) * latent.channel + (rows * latent.row + columns * latent.column)[None, :]
    inside = (channels < layout.C) & (positions < layout.size)[None, :]
    return tl.load(start + offsets, mask=inside, other=0.0).to(layout.COMPUTE)


@triton.jit
def load_velocity(conditional, unconditional, guidance_scale, sample, positions, layout):
    """v [CP, BLOCK] with guidance: v_u + g·(v_c − v_u), or v_c where there is no v_u."""
    velocity = load_tile(conditional, sample, positions, layout)
    if unconditional is not None:
        base = load_tile(unconditional, sample, positions, layout)
        velocity = base + tl.full([], guidance_scale, layout.COMPUTE) * (velocity - base)
    return velocity


@triton.jit
def store_tile(target, values, sample, positions, layout, CHANNELS_LAST: tl.constexpr = False):
    """Values in the dtype of `target`, a [B, C, H, W] that is contiguous or channels_last."""
    channels = tl.arange(0, layout.CP)[:, None]
    start = target + sample.to(tl.int64) * layout.C * layout.size
    offsets = channels + positions[None, :] * layout.C if CHANNELS_LAST else channels * layout.size + positions[None, :]
    tl.store(start + offsets, values, mask=(channels < layout.C) & (positions < layout.size)[None, :])


@triton.jit
def log_prob(deviation, std, C: tl.constexpr):
    """logp_i [BLOCK] of the deviation x' − μ [CP, BLOCK], which is 0 in the channels that pad."""
    scale = -1.0 / (2.0 * C * std * std)
    offset = -tl.log(std) - _HALF_LOG_TWO_PI
    return channel_sum(deviation * deviation) * scale + offset
