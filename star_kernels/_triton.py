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
