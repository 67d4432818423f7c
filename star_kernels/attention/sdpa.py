"""Attention by PyTorch's own kernels: those that return their log-sum-exp, and their backward passes for any attention.

PyTorch calls them "cudnn", "flash" (on the CPU and on AMD too, where it stands for AOTriton or AITER) and "efficient".
They are called as ``scaled_dot_product_attention`` calls them, by the operators of these names, so that Inductor, a
FLOP counter and a checkpointing policy see what they know. None of them masks keys without a bias, which a model of its
own may ask for; `joint_attention` has texts of unequal length in a call per row, with the row's tokens alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from star_kernels._operators import constant_in_graphs, operator
from star_kernels.attention import reference
from star_kernels.attention.mass import check_values
from star_kernels.attention.reference import Ranges, put, take, token_major

_NAMES = {1: "flash", 2: "efficient", 3: "cudnn"}
Gradients = tuple[Tensor, Tensor, Tensor]


def kernel_for(query: Tensor, num_keys: int, masked: bool = False) -> str | None:
    """The kernel that ``scaled_dot_product_attention`` prefers for tensors like `query`, None if none of these.

    With `masked` for a call with a mask of its keys.

    PyTorch is asked: it knows the device, its own version and what the user has switched off (``sdpa_kernel``). It is
    asked about two tokens that require a gradient, so that batch, gradient mode and lengths have no say; cuDNN refuses
    a single key.
    """
    # A head dimension that torch.compile left open becomes a constant here.
    return _kernel_for(query.device, query.dtype, index(query.shape[3]), 1 if num_keys == 1 else 2, masked)


@constant_in_graphs
def _kernel_for(device: torch.device, dtype: torch.dtype, head_dim: int, num_keys: int, masked: bool) -> str | None:
    settings = (
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        *torch._C._get_sdp_priority_order(),
    )
    return _ask(device, dtype, head_dim, num_keys, masked, settings)


@functools.cache
def _ask(
    device: torch.device, dtype: torch.dtype, head_dim: int, num_keys: int, masked: bool, settings: object
) -> str | None:
    with torch.enable_grad():
        query = torch.empty(1, 1, 2, head_dim, dtype=dtype, device=device, requires_grad=True)
        key = _readable(query)[:, :, :num_keys]
        mask = torch.ones(1, 1, 1, num_keys, dtype=torch.bool, device=device) if masked else None
        return _NAMES.get(torch._fused_sdp_choice(_readable(query), key, key, mask))


def backward_kernel_for(query: Tensor) -> str | None:
    """The kernel whose backward pass serves an attention that is not PyTorch's, None if none does."""
    if query.device.type == "cpu":
        return "flash"
    if query.device.type != "cuda" or query.dtype == torch.float64:
        return None
    if query.dtype == torch.float32 or torch.cuda.get_device_capability(query.device) < (8, 0):
        return None if query.dtype == torch.bfloat16 else "efficient"
    # Above 192 consumer chips have no backward pass of flash attention.
    return "flash" if query.shape[3] <= 192 and torch.backends.cuda.is_flash_attention_available() else "efficient"


def _readable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where a kernel could not read it.

    All want the D numbers of a token side by side. Those on GPUs want 16-byte words, and a D that is a multiple of 8,
    to which ``scaled_dot_product_attention`` pads as well.
    """
    on_gpu = tensor.device.type != "cpu"
    if on_gpu and tensor.shape[3] % 8:
        return pad(tensor, (0, -tensor.shape[3] % 8))
    if tensor.stride(3) == 1 and not (
        on_gpu and any(step % 8 for step in (*tensor.stride()[:3], tensor.storage_offset()))
    ):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def attention(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, scale: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out and log-sum-exp [B, heads, N], with the kernel's own backward pass.

    `key_mask` [B, N_keys] bool is True where a key takes part, as in a mask of ``scaled_dot_product_attention``. Flash
    attention takes none on a GPU.
    """
    num_queries, head_dim = query.shape[2:]
    query, key, value = _readable(query), _readable(key), _readable(value)
    bias = None if key_mask is None else _bias(key_mask, query, -65504.0 if kernel == "cudnn" else -torch.inf)
    if query.device.type == "cpu":
        return torch._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, scale=scale)
    if kernel == "flash":
        out, log_sum_exp, *_ = torch._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    elif kernel == "efficient":  # pads the rows of log-sum-exps
        if bias is not None:  # and reads a bias in 16 numbers
            bias = pad(bias, (0, -bias.shape[3] % 16))[..., : bias.shape[3]]
            bias = bias.expand(*query.shape[:3], -1)
        out, log_sum_exp, *_ = torch._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)
        log_sum_exp = log_sum_exp[..., :num_queries]
    else:  # adds an axis to them
        out, log_sum_exp, *_ = torch._scaled_dot_product_cudnn_attention(query, key, value, bias, True, scale=scale)
        log_sum_exp = log_sum_exp.flatten(2)
    return out if out.shape[3] == head_dim else out[..., :head_dim], log_sum_exp


def _bias(key_mask: Tensor, query: Tensor, masked: float) -> Tensor:
    """What is added to the logits, [B, 1, 1, N_keys]: the form that ``scaled_dot_product_attention`` gives a mask."""
    bias = torch.zeros_like(key_mask, dtype=query.dtype).masked_fill(key_mask.logical_not(), masked)
    return bias[:, None, None]


def backward(
    kernel: str,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    scale: float,
) -> Gradients:
    """Gradients for query, key and value by the kernel's backward pass, whatever computed `out` and `log_sum_exp`."""
    aten, head_dim = torch.ops.aten, query.shape[3]
    inputs = [_readable(t) for t in (grad_out, query, key, value, out)]
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, log_sum_exp, 0.0, False, scale=scale)
    log_sum_exp = log_sum_exp.contiguous()
    # The state of the random numbers is read with dropout only. It has the form that the forward pass gives it.
    in_pairs = kernel == "flash" and torch.version.hip is None
    integers = torch.uint64 if in_pairs else torch.int64
    state = query.new_empty([2] if in_pairs else [], dtype=integers), query.new_empty([], dtype=integers)
    lengths = (None, None, query.shape[2], key.shape[2])
    if kernel == "flash":
        gradients = aten._scaled_dot_product_flash_attention_backward(
            *inputs, log_sum_exp, *lengths, 0.0, False, *state, scale=scale
        )
    elif kernel == "efficient":
        # It takes the tokens of `out` to lie outside its heads and, on CUDA, log-sum-exps to come in rows of 32.
        *inputs, out = inputs
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        if torch.version.hip is None:
            log_sum_exp = pad(log_sum_exp, (0, -query.shape[2] % 32), value=torch.inf)
        gradients = aten._scaled_dot_product_efficient_attention_backward(
            *inputs, None, out, log_sum_exp, *state, 0.0, [True, True, True, False], scale=scale
        )
    else:
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *inputs, log_sum_exp.unsqueeze(-1), *state, None, *lengths, 0.0, False, scale=scale
        )
    query_gradient, key_gradient, value_gradient = (gradient[..., :head_dim] for gradient in gradients[:3])
    return query_gradient, key_gradient, value_gradient


def _rows(
    text_lengths: Tensor, query: Tensor, key: Tensor, num_image_tokens: int, text_first: bool
) -> Iterator[tuple[int, Ranges, list[Ranges]]]:
    """Of each row: its number, where its keys are, and where its queries are, in one or two parts.

    The first part is what the row has when it is alone, the second one text queries that stand for nothing. Both in
    one call could give other bits, since kernels choose their tiles by the number of queries.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    num_text = reference.num_text_keys(num_queries, num_keys, num_image_tokens)
    check_values(None, text_lengths, num_text, shortest=int(num_text == num_keys))
    for row, length in enumerate(text_lengths.tolist()):
        keys, _ = reference.row_tokens(num_keys, num_text, length, text_first)
        parts = reference.row_tokens(num_queries, num_queries - num_image_tokens, length, text_first)
        yield row, keys, [queries for queries in parts if queries]


def _for_keys(kernel: str, keys: Tensor) -> str:
    """`kernel`, as `kernel_for` would have it for the row alone."""
    return "flash" if kernel == "cudnn" and keys.shape[2] == 1 else kernel


def _backward_by(kernel: str | None, keys: Tensor) -> Callable[..., Gradients]:
    if kernel is None:
        return torch.autocast(keys.device.type, enabled=False)(reference.attention_backward)
    return functools.partial(backward, _for_keys(kernel, keys))


def _fake_gradients(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: object) -> Gradients:
    return token_major(query), token_major(key), token_major(value)


@operator("joint_attention_backward", fake=_fake_gradients)
def joint_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    text_lengths: Tensor | None,
    num_image_tokens: int,
    text_first: bool,
    scale: float,
    kernel: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key and value, each with its tokens outside its heads in memory, as SDPA lays them out.

    By the backward pass of `kernel`, without one by whichever fits, else written out. With lengths a call per row, and
    they are waited for where they are on a GPU.
    """
    kernel = kernel or backward_kernel_for(query)
    if text_lengths is None:
        whole = _backward_by(kernel, key)(grad_out, query, key, value, out, log_sum_exp, scale)
        first, second, third = (gradient.transpose(1, 2).contiguous().transpose(1, 2) for gradient in whole)
        return first, second, third
    gradients = token_major(query), token_major(key).zero_(), token_major(value).zero_()
    for row, keys, parts in _rows(text_lengths, query, key, num_image_tokens, text_first):
        tensors = [tensor.narrow(0, row, 1) for tensor in (grad_out, query, out, log_sum_exp[..., None], *gradients)]
        *asked, query_gradient, key_gradient, value_gradient = tensors
        key_row, value_row = take(key.narrow(0, row, 1), keys), take(value.narrow(0, row, 1), keys)
        sums: list[Tensor] = []
        for queries in parts:
            grad, part, part_out, statistics = (take(tensor, queries) for tensor in asked)
            part_gradient, *others = _backward_by(kernel, key_row)(
                grad, part, key_row, value_row, part_out, statistics[..., 0], scale
            )
            put(query_gradient, queries, part_gradient)
            sums = [total + other for total, other in zip(sums, others, strict=True)] if sums else others
        put(key_gradient, keys, sums[0])
        put(value_gradient, keys, sums[1])
    return gradients


def _fake_rows(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    log_sum_exp = query.new_empty(query.shape[:3], dtype=reference.statistics_dtype(query))
    return token_major(query), log_sum_exp


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, text_lengths, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, text_lengths)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *joint_attention_backward(grad_out, *ctx.saved_tensors, *ctx.options), *(None,) * 5


@operator("attention_by_rows", fake=_fake_rows, save=_save_for_backward, backward=_backward)
def attention_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_lengths: Tensor,
    num_image_tokens: int,
    text_first: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """out and log-sum-exp of `attention` over each row's own keys. Lengths that are on a GPU are waited for."""
    out = token_major(query)
    log_sum_exp = query.new_empty(query.shape[:3], dtype=reference.statistics_dtype(query))
    for row, keys, parts in _rows(text_lengths, query, key, num_image_tokens, text_first):
        query_row, out_row, statistics_row = (t.narrow(0, row, 1) for t in (query, out, log_sum_exp[..., None]))
        key_row, value_row = take(key.narrow(0, row, 1), keys), take(value.narrow(0, row, 1), keys)
        for queries in parts:
            part, statistics = attention(
                _for_keys(kernel, key_row), take(query_row, queries), key_row, value_row, scale
            )
            put(out_row, queries, part)
            put(statistics_row, queries, statistics[..., None])
    return out, log_sum_exp
