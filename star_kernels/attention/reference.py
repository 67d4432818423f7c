"""Joint attention with attention mass in plain PyTorch: definition and unfused path (docs/method.md, section 3).

Everything is computed in float32 (float64 for float64 input) whatever the input's dtype. The batch is walked one sample
at a time, so that a sample meets the same BLAS calls whatever else is in its batch: that makes the results
batch-invariant bit for bit on any BLAS, and bounds the N x N matrices to those of one sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

Ranges = list[tuple[int, int]]  # [first, end) of tokens


def num_text_keys(num_queries: int, num_keys: int, num_image_tokens: int) -> int:
    """How many of the keys are text.

    Fewer image tokens than queries: the sequence is joint, and the rest of it is text. As many image tokens as queries:
    no query is text, so this is cross-attention and every key is text (or nothing is captured, and it does not matter).
    """
    return num_keys if num_image_tokens == num_queries else num_keys - num_image_tokens


def token_slices(
    num_queries: int, num_keys: int, num_image_tokens: int, text_first: bool
) -> tuple[slice, slice, slice, slice]:
    """Where a sequence keeps its (image queries, text queries, image keys, text keys)."""
    num_image_keys = num_keys - num_text_keys(num_queries, num_keys, num_image_tokens)
    return *_split(num_queries, num_image_tokens, text_first), *_split(num_keys, num_image_keys, text_first)


def captured_tokens(
    num_queries: int, num_keys: int, num_image_tokens: int, text_first: bool, direction: str
) -> tuple[slice, slice]:
    """The queries and the keys between which the mass of a direction is."""
    image_queries, text_queries, image_keys, text_keys = token_slices(
        num_queries, num_keys, num_image_tokens, text_first
    )
    return (image_queries, text_keys) if direction == "image_to_text" else (text_queries, image_keys)


def _split(total: int, num_image: int, text_first: bool) -> tuple[slice, slice]:
    """Where image and text stand among `total` tokens."""
    num_text = total - num_image
    if text_first:
        return slice(num_text, total), slice(0, num_text)
    return slice(0, num_image), slice(num_image, total)


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if every tensor is float64, else float32."""
    return torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def token_major(tensor: Tensor) -> Tensor:
    """Like `tensor` [B, heads, N, D], empty, tokens outside heads in memory, as a projection reads them."""
    batch, heads, tokens, head_dim = tensor.shape
    strides = (tokens * heads * head_dim, head_dim, heads * head_dim, 1)
    return tensor.new_empty_strided(tensor.shape, strides)


def _probabilities(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over all keys [heads, N_query, N_key] and its log-sum-exp [heads, N_query], of one sample."""
    dtype = statistics_dtype(query)
    logits = (query.to(dtype) * scale) @ key.to(dtype).transpose(-1, -2)
    largest = logits.amax(-1, keepdim=True)
    # In place: at this size a second N x N matrix costs more than the arithmetic.
    exponentials = logits.sub_(largest).exp_()
    normaliser = exponentials.sum(-1, keepdim=True)
    return exponentials.div_(normaliser), (largest + normaliser.log()).squeeze(-1)


def row_tokens(total: int, num_text: int, length: int, text_first: bool) -> tuple[Ranges, Ranges]:
    """Where a row has tokens of its own: all but the text tokens from `length` on, which are the second result."""
    _, text = _split(total, total - num_text, text_first)
    end = text.start + min(length, num_text)
    own, padding = [(0, end), (text.stop, total)], [(end, text.stop)]
    return [r for r in own if r[0] < r[1]], [r for r in padding if r[0] < r[1]]


def take(tensor: Tensor, ranges: Ranges) -> Tensor:
    """The tokens in `ranges`, one range or more, of [..., heads, N, D]."""
    pieces = [tensor.narrow(-2, start, end - start) for start, end in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -2)


def put(target: Tensor, ranges: Ranges, values: Tensor) -> None:
    """Write what `take` would read."""
    first = 0
    for start, end in ranges:
        target.narrow(-2, start, end - start).copy_(values.narrow(-2, first, end - start))
        first += end - start


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None = None,
    *,
    num_image_tokens: int,
    text_first: bool,
    scale: float,
    rows: tuple[int, int],
    text_lengths: Tensor | None = None,
    direction: str = "image_to_text",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attention, this layer's mass M or T, and the log-sum-exp of the logits.

    A row's own tokens are computed as if it were alone, and then what its other text queries attend to.

    Args:
        query: [B, heads, N_query, D].
        key, value: [B, heads, N_key, D].
        unit_weights: U, [rows, N_text, K], or None for no mass.
        num_image_tokens, text_first: see `token_slices`.
        scale: factor of the logits.
        rows: half-open range of batch rows whose mass is captured.
        text_lengths: [B], how many of a row's text tokens are its own, by default all.
        direction: "image_to_text" for M, "text_to_image" for T.

    Returns:
        out [B, heads, N_query, D] in the dtype of `query`, see `token_major`;
        mass [rows, num_image_tokens, K] or None, float32 (float64 if `query` and `unit_weights` both are);
        log_sum_exp [B, heads, N_query], float32 (float64 for float64 `query`).
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    num_text = num_text_keys(num_queries, num_keys, num_image_tokens)
    dtype = statistics_dtype(query)
    first, end = rows
    out = token_major(query)
    log_sum_exp = query.new_empty(query.shape[:3], dtype=dtype)
    mass = None
    if unit_weights is not None:
        shape = (end - first, num_image_tokens, unit_weights.shape[2])
        mass = query.new_empty(shape, dtype=statistics_dtype(query, unit_weights))
    for b in range(query.shape[0]):
        length = num_text if text_lengths is None else int(text_lengths[b])
        keys, _ = row_tokens(num_keys, num_text, length, text_first)
        own, padding = row_tokens(num_queries, num_queries - num_image_tokens, length, text_first)
        for queries in (padding, own) if padding else (own,):
            probabilities, statistics = _probabilities(take(query[b], queries), take(key[b], keys), scale)
            put(out[b], queries, (probabilities @ take(value[b], keys).to(dtype)).to(out.dtype))
            put(log_sum_exp[b, :, :, None], queries, statistics[..., None])
        if mass is not None and unit_weights is not None and first <= b < end:
            _, own_queries, own_keys = probabilities.shape
            image_queries, text_queries = _split(own_queries, num_image_tokens, text_first)
            image_keys, text_keys = _split(own_keys, own_keys - length, text_first)
            weights = unit_weights[b - first, :length].to(dtype)
            if direction == "image_to_text":
                mass[b - first] = probabilities[:, image_queries, text_keys].mean(0) @ weights
            else:
                mass[b - first] = probabilities[:, text_queries, image_keys].mean(0).transpose(0, 1) @ weights
    return out, mass, log_sum_exp


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
    """The mass from the log-sum-exp of the logits, over the first `text_lengths` text tokens.

    Args and result: see `star_kernels.attention_mass`.
    """
    dtype, to_text = statistics_dtype(query), direction == "image_to_text"
    num_image = (query if to_text else key).shape[2]
    shape = (query.shape[0], num_image, unit_weights.shape[2])
    mass = query.new_empty(shape, dtype=statistics_dtype(query, unit_weights))
    for b in range(query.shape[0]):
        text = slice(0, unit_weights.shape[1] if text_lengths is None else int(text_lengths[b]))
        queries, keys = (slice(None), text) if to_text else (text, slice(None))
        logits = (query[b, :, queries].to(dtype) * scale) @ key[b, :, keys].to(dtype).transpose(-1, -2)
        # A probability above 1 would come of the log-sum-exp's rounding.
        probabilities = logits.sub_(log_sum_exp[b, :, queries, None]).clamp_(max=0).exp_().mean(0)
        mass[b] = (probabilities if to_text else probabilities.transpose(0, 1)) @ unit_weights[b, text].to(dtype)
    return mass


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key and value from out and log-sum-exp, for where PyTorch has no flash backward."""
    dtype = statistics_dtype(query)
    grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    for b in range(query.shape[0]):
        q, k, v, o, grad = (tensor[b].to(dtype) for tensor in (query, key, value, out, grad_out))
        logits = (q * scale) @ k.transpose(-1, -2)
        probabilities = logits.sub_(log_sum_exp[b].unsqueeze(-1)).exp_()
        grad_value[b] = probabilities.transpose(-1, -2) @ grad
        grad_logits = grad @ v.transpose(-1, -2)
        grad_logits.sub_((grad * o).sum(-1, keepdim=True)).mul_(probabilities)
        grad_query[b] = (grad_logits @ k) * scale
        grad_key[b] = (grad_logits.transpose(-1, -2) @ q) * scale
    return grad_query, grad_key, grad_value
