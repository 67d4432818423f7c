"""What Triton's interpreter lacks, for kernels that it has to run: rounding to bfloat16, and products of bfloat16."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def cast(value, dtype: tl.constexpr):
    """float32 `value` in `dtype`, rounded to nearest, which Triton's interpreter does not do for bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def dot(left, right, accumulator):
    """accumulator + left @ right in float32, never through tf32; Triton's interpreter cannot multiply bfloat16."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision="ieee")


@triton.jit
def _halves(matrix):
    """The left and the right half of the columns of `matrix`."""
    rows: tl.constexpr = matrix.shape[0]
    columns: tl.constexpr = matrix.shape[1]
    return tl.split(tl.permute(tl.reshape(matrix, [rows, 2, columns // 2]), (0, 2, 1)))


@triton.jit
def dot_rows(left, right, accumulator):
    """accumulator + left @ right^T in float32, for float32 in pieces that leave registers for something else."""
    if left.dtype == tl.float32 and left.shape[1] > 32:
        left0, left1 = _halves(left)
        right0, right1 = _halves(right)
        return dot_rows(left1, right1, dot_rows(left0, right0, accumulator))
    else:
        return dot(left, tl.trans(right), accumulator)
