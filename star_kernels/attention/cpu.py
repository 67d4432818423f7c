"""The calls into csrc/attention.cpp and csrc/attention_mass.cpp."""

from __future__ import annotations

import torch
from torch import Tensor


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None,
    *,
    num_image_tokens: int,
    text_first: bool,
    scale: float,
    rows: tuple[int, int],
    direction: str,
    text_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like the reference, for float32, bfloat16 and float16: out, mass of either direction, log-sum-exp.

    Without unit weights the mass is empty.
    """
    to_image = direction == "text_to_image"
    return torch.ops.star_kernels_cpu.joint_attention(
        query, key, value, unit_weights, num_image_tokens, text_first, scale, *rows, to_image, text_lengths
    )


def attention_mass(
    query: Tensor,
    key: Tensor,
    unit_weights: Tensor,
    log_sum_exp: Tensor,
    *,
    scale: float,
    text_lengths: Tensor | None,
    direction: str,
) -> Tensor:
    """Like the reference, for float32, bfloat16 and float16."""
    return torch.ops.star_kernels_cpu.attention_mass(
        query, key, unit_weights, log_sum_exp, scale, text_lengths, direction == "text_to_image"
    )
