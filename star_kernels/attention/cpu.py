"""The call into csrc/attention.cpp."""

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
) -> tuple[Tensor, Tensor, Tensor]:
    """Like the reference, for float32, bfloat16 and float16: out, mass of either direction, log-sum-exp.

    Without unit weights the mass is empty.
    """
    return torch.ops.star_kernels_cpu.joint_attention(
        query, key, value, unit_weights, num_image_tokens, text_first, scale, *rows, direction == "text_to_image"
    )
