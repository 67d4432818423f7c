"""Attention with capture as it is had without the library's kernels, called like `star_kernels.joint_attention`.

Needs torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def text_column_pass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None = None,
    *,
    num_image_tokens: int,
    text_first: bool = False,
    mass: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """PyTorch's flash attention, and the probabilities of the text columns recomputed from its log-sum-exp.

    What can be had without a kernel of one's own: nothing of size N x N, but image x text numbers per head.
    """
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    if unit_weights is None:
        return functional.scaled_dot_product_attention(query, key, value), None
    out, log_sum_exp = flash_with_log_sum_exp(query, key, value)
    first, end = rows or (0, len(query))
    image, text = _places(query, key, num_image_tokens, text_first)
    logits = query[first:end, :, image] @ key[first:end, :, text].mT  # [rows, heads, image, text]
    logits = logits.float().mul_(query.shape[-1] ** -0.5)
    probabilities = logits.sub_(log_sum_exp[first:end, :, image, None]).exp_()
    return out, _add(mass, probabilities.mean(1) @ unit_weights.float())


def flash_with_log_sum_exp(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What SDPA runs, asked for its log-sum-exp [B, heads, N] too."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    if query.dtype == torch.float32:
        out, log_sum_exp, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, None, True)
    else:
        out, log_sum_exp, *_ = aten._scaled_dot_product_flash_attention(query, key, value)
    return out, log_sum_exp[:, :, : query.shape[2]]


def materialised(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None = None,
    *,
    num_image_tokens: int,
    text_first: bool = False,
    mass: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """Softmax written out in the model's dtype, its heads averaged: what extractors of attention maps do.

    Where nothing is captured they leave the model its own attention.
    """
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    if unit_weights is None:
        return functional.scaled_dot_product_attention(query, key, value), None
    first, end = rows or (0, len(query))
    image, text = _places(query, key, num_image_tokens, text_first)
    probabilities = ((query @ key.mT) * query.shape[-1] ** -0.5).softmax(-1)
    captured = probabilities[first:end, :, image, text].mean(1).float() @ unit_weights.float()
    return probabilities @ value, _add(mass, captured)


def _places(query: Tensor, key: Tensor, num_image_tokens: int, text_first: bool) -> tuple[slice, slice]:
    """Those of the image tokens among the queries, and of the text tokens among the keys."""
    num_text = query.shape[2] - num_image_tokens
    if num_text == 0:
        return slice(None), slice(None)
    if text_first:
        return slice(num_text, None), slice(num_text)
    return slice(num_image_tokens), slice(num_image_tokens, key.shape[2])


def _add(mass: Tensor | None, captured: Tensor) -> Tensor:
    return captured if mass is None else mass.add_(captured)


def _autocast(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype that autocast would give it, which it does not for operators that are called by name."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
