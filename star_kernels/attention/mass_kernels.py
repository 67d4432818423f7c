"""The mass from the log-sum-exp, and the mean over heads, on the GPU (docs/method.md, section 3)."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels._kernel_calls import KernelCall
from star_kernels._triton import cast, dot, dot_rows
from star_kernels.attention.table import Configuration

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=("heads", "num_elements"))
def head_mean_kernel(head_mass_ptr, mass_ptr, heads, num_elements, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr):
    """mass [rows, num_elements] from head_mass [rows, heads, num_elements], the heads in ascending order."""
    blocks = tl.cdiv(num_elements, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    elements = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = elements < num_elements
    head_range = tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in tl.range(0, heads, BLOCK_H):
        chosen = first + head_range
        slots = head_mass_ptr + (row * heads + chosen)[:, None] * num_elements + elements[None, :]
        total += tl.sum(tl.load(slots, mask=(chosen < heads)[:, None] & inside[None, :], other=0.0), 0)
    tl.store(mass_ptr + row * num_elements + elements, total / heads, mask=inside)


@triton.jit
def _unit_mass_tile(
    total,  # [BLOCK_M, BLOCK_K]
    image,  # [BLOCK_M, BLOCK_D]
    row_normaliser,  # [BLOCK_M], log-sum-exp · log2 e with NORMALISE_ROWS, otherwise any tensor
    text_pointers,  # [BLOCK_N, BLOCK_D]
    unit_pointers,  # [BLOCK_N, BLOCK_K]
    log_sum_exp_pointers,  # [BLOCK_N] without NORMALISE_ROWS
    text_left,
    unit_mask,  # [1, BLOCK_K]
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORMALISE_ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """total + P @ U over a tile of text tokens, P from logits and their log-sum-exp."""
    valid = tl.arange(0, BLOCK_N) < text_left
    text_mask = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if MASKED:
        text_mask = text_mask & valid[:, None]
        unit_mask = unit_mask & valid[:, None]
    text = tl.load(text_pointers, mask=text_mask, other=0.0)
    logits = dot_rows(image, text, tl.zeros([image.shape[0], BLOCK_N], dtype=tl.float32))
    if NORMALISE_ROWS:
        normaliser = row_normaliser[:, None]
    else:
        column = tl.load(log_sum_exp_pointers, mask=valid, other=0.0) if MASKED else tl.load(log_sum_exp_pointers)
        normaliser = (column * LOG2_E)[None, :]
    probabilities = tl.exp2(tl.fma(logits, scale, -normaliser))
    if MASKED:
        probabilities = tl.where(valid[None, :], probabilities, 0.0)
    weights = tl.load(unit_pointers, mask=unit_mask, other=0.0).to(tl.float32)
    mass_dtype: tl.constexpr = tl.float32 if text.dtype == tl.float32 else tl.bfloat16
    return dot(cast(probabilities, mass_dtype), cast(weights, mass_dtype), total)


@triton.jit(do_not_specialize=("heads", "num_image", "num_text", "num_units"))
def unit_mass_kernel(
    image_ptr,
    text_ptr,
    unit_ptr,
    log_sum_exp_ptr,
    mass_ptr,
    image_stride_b,
    image_stride_h,
    image_stride_n,
    image_stride_d,
    text_stride_b,
    text_stride_h,
    text_stride_n,
    text_stride_d,
    unit_stride_b,
    unit_stride_n,
    unit_stride_k,
    log_sum_exp_stride_b,
    log_sum_exp_stride_h,
    heads,
    num_image,
    num_text,
    num_units,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORMALISE_ROWS: tl.constexpr,
    TEXT_TAIL: tl.constexpr,
):
    """BLOCK_M image tokens and BLOCK_K units of one sample, all heads and text tokens.

    The log-sum-exp belongs to the image tokens with NORMALISE_ROWS (their queries meet text keys), and to the text
    tokens without (image keys meet text queries).
    """
    image_blocks = tl.cdiv(num_image, BLOCK_M)
    unit_blocks = tl.cdiv(num_units, BLOCK_K)
    program = tl.program_id(0)
    images = program % image_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    units = program // image_blocks % unit_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    batch = (program // image_blocks // unit_blocks).to(tl.int64)
    tokens = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)

    unit_mask = (units < num_units)[None, :]
    image_pointers = (
        image_ptr
        + batch * image_stride_b
        + images.to(tl.int64)[:, None] * image_stride_n
        + dims[None, :] * image_stride_d
    )
    text_pointers = text_ptr + batch * text_stride_b + tokens[:, None] * text_stride_n + dims[None, :] * text_stride_d
    unit_pointers = unit_ptr + batch * unit_stride_b + tokens[:, None] * unit_stride_n + units[None, :] * unit_stride_k
    num_full = num_text // BLOCK_N * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for h in tl.range(0, heads):
        head = tl.cast(h, tl.int64)
        image = tl.load(
            image_pointers + head * image_stride_h,
            mask=(images < num_image)[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        normalisers = log_sum_exp_ptr + batch * log_sum_exp_stride_b + head * log_sum_exp_stride_h
        row_normaliser = tl.zeros([BLOCK_M], dtype=tl.float32)
        if NORMALISE_ROWS:
            row_normaliser = tl.load(normalisers + images, mask=images < num_image, other=0.0) * LOG2_E
        head_text = text_pointers + head * text_stride_h
        for start in tl.range(0, num_full, BLOCK_N):
            first = tl.cast(start, tl.int64)
            total = _unit_mass_tile(
                total,
                image,
                row_normaliser,
                head_text + first * text_stride_n,
                unit_pointers + first * unit_stride_n,
                normalisers + first + tokens,
                num_text,
                unit_mask,
                scale,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
                NORMALISE_ROWS,
                MASKED=False,
            )
        if TEXT_TAIL:
            first = tl.cast(num_full, tl.int64)
            total = _unit_mass_tile(
                total,
                image,
                row_normaliser,
                head_text + first * text_stride_n,
                unit_pointers + first * unit_stride_n,
                normalisers + first + tokens,
                num_text - num_full,
                unit_mask,
                scale,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
                NORMALISE_ROWS,
                MASKED=True,
            )
    tl.store(
        mass_ptr + (batch * num_image + images)[:, None] * num_units + units[None, :],
        total / heads,
        mask=(images < num_image)[:, None] & unit_mask,
    )


def padded_head_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def within_reach(tensor: Tensor, configuration: Configuration) -> Tensor:
    """`tensor` [..., tokens, elements], dense if a tile of it would span more than 32 bits, in which kernels count."""
    tokens = min(tensor.shape[-2], max(16, configuration.block_n))
    span = (tokens - 1) * tensor.stride(-2) + (tensor.shape[-1] - 1) * tensor.stride(-1)
    return tensor if span < 2**31 else tensor.contiguous()


def unit_mass_configuration(dtype: torch.dtype, attention: Configuration) -> Configuration:
    """At most 64 rows: there are image tokens but for few programs, which loop over the heads.

    With as many keys as the attention kernel takes at a time, some of the table's rows would spill registers.
    """
    if dtype == torch.float32:
        return replace(attention, block_n=16)
    return Configuration(min(64, attention.block_m), max(16, attention.block_n // 2), 4, min(2, attention.num_stages))


def unit_mass_call(
    image: Tensor,
    text: Tensor,
    unit_weights: Tensor,
    log_sum_exp: Tensor,
    mass: Tensor,
    *,
    normalise_rows: bool,
    scale: float,
    configuration: Configuration,
) -> KernelCall:
    """The mass kernel of one direction.

    Args:
        image: [rows, heads, num_image, D], queries for M and keys for T.
        text: [rows, heads, N_text, D], keys for M and queries for T.
        unit_weights: [rows, N_text, K].
        log_sum_exp: [rows, heads, num_image] with `normalise_rows` (M), otherwise [rows, heads, N_text] (T), with
            neighbours along the tokens.
        mass: [rows, num_image, K], written.
    """
    rows, heads, num_image, head_dim = image.shape
    num_text, num_units = text.shape[2], unit_weights.shape[2]
    block_k = 16 if num_units <= 16 else 32  # More at once would spill registers in float32.
    arguments = {
        "image_ptr": image,
        "text_ptr": text,
        "unit_ptr": unit_weights,
        "log_sum_exp_ptr": log_sum_exp,
        "mass_ptr": mass,
        **{f"image_stride_{axis}": stride for axis, stride in zip("bhnd", image.stride(), strict=True)},
        **{f"text_stride_{axis}": stride for axis, stride in zip("bhnd", text.stride(), strict=True)},
        **{f"unit_stride_{axis}": stride for axis, stride in zip("bnk", unit_weights.stride(), strict=True)},
        "log_sum_exp_stride_b": log_sum_exp.stride(0),
        "log_sum_exp_stride_h": log_sum_exp.stride(1),
        "heads": heads,
        "num_image": num_image,
        "num_text": num_text,
        "num_units": num_units,
        "scale": scale * LOG2_E.value,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": configuration.block_m,
        "BLOCK_N": configuration.block_n,
        "BLOCK_K": block_k,
        "NORMALISE_ROWS": normalise_rows,
        "TEXT_TAIL": num_text % configuration.block_n > 0,
    }
    dtype = str(image.dtype).removeprefix("torch.")
    direction = "image to text" if normalise_rows else "text to image"
    return KernelCall(
        f"mass from log-sum-exp, {direction}, {dtype}, head dim {head_dim}, {num_units} units",
        unit_mass_kernel,
        (triton.cdiv(num_image, configuration.block_m) * triton.cdiv(num_units, block_k) * rows,),
        arguments,
        configuration.options,
    )


def head_mean_call(head_mass: Tensor, mass: Tensor) -> KernelCall:
    """The mean over heads: mass [rows, image, K] from head_mass [rows, heads, image, K]."""
    rows, heads, num_image_tokens, num_units = head_mass.shape
    num_elements = num_image_tokens * num_units
    block = 256
    return KernelCall(
        "mean over heads",
        head_mean_kernel,
        (rows * triton.cdiv(num_elements, block),),
        {
            "head_mass_ptr": head_mass,
            "mass_ptr": mass,
            "heads": heads,
            "num_elements": num_elements,
            "BLOCK_H": 8,
            "BLOCK": block,
        },
        {"num_warps": 4, "enable_fp_fusion": True},
    )
