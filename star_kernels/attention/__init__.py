"""Joint attention that also returns how much each image token attends to each text unit (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from star_kernels import backends
from star_kernels._checks import check_choice, check_number, check_reverse_mode, check_tensor
from star_kernels._operators import constant_in_graphs, operator
from star_kernels.attention import cpu, reference, sdpa, table
from star_kernels.attention.mass import (
    DIRECTIONS,
    add_layer,
    autocast,
    check_mass,
    check_text_lengths,
    check_values,
    mass_beside,
)

KERNELS: tuple[str, ...] = ("cpu", "triton")
IMPLEMENTATIONS = ("auto", *table.IMPLEMENTATIONS)
_MAX_HEAD_DIM_TRITON = 128


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None = None,
    *,
    num_image_tokens: int,
    text_first: bool = False,
    text_lengths: Tensor | None = None,
    scale: float | None = None,
    mass: Tensor | None = None,
    layer_weight: float = 1.0,
    rows: tuple[int, int] | None = None,
    direction: Literal["image_to_text", "text_to_image"] = "image_to_text",
    implementation: Literal["auto", "fused", "sdpa"] = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over image and text tokens, and the attention mass per image token and text unit.

    `out` is what ``torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)`` returns, with its
    gradients. The mass is the head average of P @ U for the image rows of the softmax P and the unit weights U
    (docs/method.md, section 3).

    How a sequence is read: with fewer image tokens than queries it is joint, the same tokens in `query` and `key`,
    N_text = N - num_image_tokens of them text. With as many image tokens as queries there is no text query: without
    `unit_weights` this is attention among image tokens (or any other, nothing is captured), with `unit_weights` it is
    cross-attention, all keys are text and N_text is the number of keys, also where that equals the number of queries.

    Args:
        query: [B, heads, N, D], float32, bfloat16, float16 or float64, any strides.
        key: [B, heads, N_keys, D], dtype and device of `query`. N_keys = N unless all queries are image tokens.
        value: like `key`. Under ``torch.autocast`` the three are cast as ``scaled_dot_product_attention`` casts them.
        unit_weights: U, [rows, N_text, K], any of the same dtypes, finite and >= 0, or None to capture nothing. The
            values are checked on the CPU only: on a GPU the check would have to wait for the device.
        num_image_tokens: how many of the N queries are image tokens, 1 to N.
        text_first: the text tokens stand before the image tokens (FLUX) and not behind them (SD3).
        text_lengths: [B] int32 or int64, 0 to N_text, at least 1 where all keys are text (checked on the CPU only).
            Text keys from there on take no part, neither in the softmax nor in the mass, and get no gradient; text
            queries from there on still attend, and count nothing in T. A row's own tokens come out as those of the row
            alone, without the others, bit for bit. By default all take part. On the device of `query`, or on the CPU:
            from a GPU the backward pass of ``fused``, and ``sdpa`` at once, have to fetch them, which waits for the
            device, while a capture of CUDA graphs wants them there.
        scale: positive factor of the logits, by default D ** -0.5.
        mass: [rows, num_image_tokens, K] float32 (float64 if `query` and `unit_weights` both are), without gradient.
            This layer's mass is added to it in place, and it is returned: one buffer serves all layers of a step.
        layer_weight: finite number >= 0 that this layer's mass is multiplied by; 1/layers in each gives the mean.
        rows: half-open range (first, end) of batch rows that are captured, by default all; `unit_weights` and `mass`
            then have end - first rows. Under guidance: the conditional half.
        direction: ``image_to_text`` for M, how much image token i attends to the unit; ``text_to_image`` for T, how
            much the unit's tokens attend to image token i (it needs text queries).
        implementation: ``fused``, the library's kernel, which captures the mass on its way; ``sdpa``, the kernel that
            ``scaled_dot_product_attention`` prefers here if it returns its log-sum-exp (cuDNN, flash, efficient), with
            its own backward pass, and then `attention_mass`; ``auto``: on a GPU what was measured to be faster there,
            ``sdpa`` where nothing was, on the CPU ``fused``. The choice depends on the device, the dtype, the head
            dimension and the number of keys, and never on batch, gradient mode or capture
            (`star_kernels.attention.attention_implementation`). Under ``sdpa`` `out` and its gradients are those of
            PyTorch's kernel bit for bit. Each stands in for the other where it has no kernel, and that is said once.
        backend: of the library's kernels, ``auto``, ``triton``, ``cpu`` or ``reference``; one that is asked for by name
            makes ``auto`` ``fused``. float64 is computed by the reference under ``auto`` and ``cpu``: it is for checks
            of derivatives.

    Returns:
        out [B, heads, N, D] in the dtype of `query`, and the mass [rows, num_image_tokens, K], or None without
        `unit_weights`. The mass carries no gradient. Second derivatives are not implemented; torch.func and
        forward-mode derivatives are out of scope and raise NotImplementedError.

    The backward pass is PyTorch's: under ``sdpa`` that of its kernel, else flash attention's or, in float32 on CUDA,
    efficient attention's. docs/kernels.md says what is reproducible bit for bit, where and with which setting.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong rank, shape, device or value, a zero-size input, an unknown backend, implementation or
            direction.
        RuntimeError: the backend asked for cannot run here.
    """
    check_tensor("query", query, ("B", "heads", "N", "D"))
    batch, heads, num_queries, head_dim = query.shape
    check_tensor("key", key, (batch, heads, "N_keys", head_dim), device=query.device)
    num_keys = key.shape[2]
    check_tensor("value", value, (batch, heads, num_keys, head_dim), device=query.device)
    query, key, value = autocast(query), autocast(key), autocast(value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            check_tensor(name, tensor, tensor.shape, dtypes=(query.dtype,))

    if isinstance(num_image_tokens, bool) or not isinstance(num_image_tokens, int):
        raise TypeError(f"num_image_tokens: expected an int, got {type(num_image_tokens).__name__}")
    if not 1 <= num_image_tokens <= num_queries:
        raise ValueError(f"num_image_tokens: expected 1 to {num_queries} (the queries), got {num_image_tokens}")
    if num_image_tokens < num_queries and num_keys != num_queries:
        raise ValueError(
            f"key: expected {num_queries} tokens like query, got {num_keys}; only where every query is an image token "
            f"(num_image_tokens={num_queries}, got {num_image_tokens}) the keys may be other tokens than the queries"
        )
    if not isinstance(text_first, bool):
        raise TypeError(f"text_first: expected a bool, got {type(text_first).__name__}")
    scale = head_dim**-0.5 if scale is None else check_number("scale", scale, low=0, low_open=True)
    layer_weight = check_number("layer_weight", layer_weight, low=0)
    check_text_lengths(text_lengths, batch, query.device)
    check_choice("direction", direction, DIRECTIONS)
    chosen = _implementation(query, num_keys, implementation, backend)
    first, end = _check_rows(rows, batch)

    if unit_weights is None:
        for name, argument in (("mass", mass), ("rows", rows)):
            if argument is not None:
                raise ValueError(f"{name}: expected None without unit_weights, got {type(argument).__name__}")
    else:
        num_text_tokens = reference.num_text_keys(num_queries, num_keys, num_image_tokens)
        check_tensor("unit_weights", unit_weights, (end - first, num_text_tokens, "K"), device=query.device)
        if direction == "text_to_image" and num_image_tokens == num_queries:
            raise ValueError("direction: expected image_to_text where no query is a text token, got text_to_image")
        if mass is not None:
            check_mass(mass, (end - first, num_image_tokens, unit_weights.shape[2]), query, unit_weights)

    check_reverse_mode("joint_attention", (query, key, value, unit_weights, mass))
    sequence = (num_image_tokens, text_first, scale)
    if chosen == "fused":
        out, layer_mass, _ = _joint_attention(
            query, key, value, unit_weights, *sequence, first, end, direction, backend, text_lengths
        )
        return out, None if unit_weights is None else add_layer(mass, layer_mass, layer_weight)
    kernel = chosen.removeprefix("sdpa:")
    if text_lengths is None:
        out, log_sum_exp = sdpa.attention(kernel, query, key, value, scale)
    else:
        out, log_sum_exp = sdpa.attention_by_rows(query, key, value, text_lengths, *sequence, kernel)
    if unit_weights is None:
        return out, None
    return out, mass_beside(
        query,
        key,
        unit_weights,
        log_sum_exp,
        num_image_tokens=num_image_tokens,
        text_first=text_first,
        rows=slice(first, end),
        text_lengths=text_lengths,
        direction=direction,
        scale=scale,
        mass=mass,
        layer_weight=layer_weight,
        backend=backend,
    )


def attention_implementation(query: Tensor, key: Tensor, *, implementation: str = "auto", backend: str = "auto") -> str:
    """What `joint_attention` runs for these arguments: "fused", or "sdpa:" and PyTorch's name for its kernel."""
    return _implementation(autocast(query[:1, :1, :1]), key.shape[2], implementation, backend)


def _implementation(query: Tensor, num_keys: int, implementation: str, backend: str) -> str:
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a str, got {type(backend).__name__}")
    check_choice("backend", backend, ("auto", *backends.NAMES))
    if implementation == "auto":
        measured = table.implementation_for(query.device, query.dtype, query.shape[3], num_keys)
        implementation = "fused" if backend != "auto" else measured
    materialised = query.device.type != "cpu" and query.shape[3] > _MAX_HEAD_DIM_TRITON and backend == "auto"
    if implementation == "fused" and not materialised:
        return "fused"
    kernel = sdpa.kernel_for(query, num_keys)
    if kernel is not None and implementation == "fused":
        _say_once(f"joint_attention runs as sdpa: no fused kernel has head dimensions above {_MAX_HEAD_DIM_TRITON}")
    elif kernel is None and implementation == "sdpa":
        _say_once(f"joint_attention runs as fused: no kernel of PyTorch's returns a log-sum-exp for {query.dtype} here")
    return "fused" if kernel is None else f"sdpa:{kernel}"


@constant_in_graphs
def _say_once(message: str) -> None:
    # By torch.compile while it traces.
    backends.say_once(message)


def _check_rows(rows: tuple[int, int] | None, batch: int) -> tuple[int, int]:
    if rows is None:
        return 0, batch
    if not isinstance(rows, (tuple, list)) or len(rows) != 2:
        raise TypeError(f"rows: expected a pair (first, end) or None, got {rows!r}")
    first, end = rows
    if any(isinstance(bound, bool) or not isinstance(bound, int) for bound in (first, end)):
        raise TypeError(f"rows: expected two ints, got {rows!r}")
    if not 0 <= first < end <= batch:
        raise ValueError(f"rows: expected 0 <= first < end <= {batch} (the batch), got {rows!r}")
    return first, end


def _resolve_backend(backend: str, query: Tensor) -> str:
    if query.shape[3] <= _MAX_HEAD_DIM_TRITON:
        return backends.resolve_backend("joint_attention", backend, query.device, KERNELS)
    name = f"joint_attention with head dimension {query.shape[3]}"
    return backends.resolve_backend(name, backend, query.device, tuple(k for k in KERNELS if k != "triton"))


def _kernel(backend: str, query: Tensor) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:
    # float64 is for checks of derivatives, and precise rather than fast: the reference computes it for every backend.
    if backend == "reference" or query.dtype == torch.float64:
        return torch.autocast(query.device.type, enabled=False)(reference.joint_attention)
    if backend == "cpu":
        return cpu.joint_attention
    # Not at the top: importing the library loads torch alone.
    from star_kernels.attention import triton_kernels

    return triton_kernels.joint_attention


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None,
    num_image_tokens: int,
    text_first: bool,
    scale: float,
    first_row: int,
    end_row: int,
    direction: str,
    backend: str,
    text_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    log_sum_exp = query.new_empty(query.shape[:3], dtype=reference.statistics_dtype(query))
    if unit_weights is None:
        mass = query.new_empty(0)
    else:
        shape = (end_row - first_row, num_image_tokens, unit_weights.shape[2])
        mass = query.new_empty(shape, dtype=reference.statistics_dtype(query, unit_weights))
    return reference.token_major(query), mass, log_sum_exp


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, _, *ctx.sequence = inputs[:7]
    out, mass, log_sum_exp = output
    ctx.mark_non_differentiable(mass, log_sum_exp)
    ctx.save_for_backward(query, key, value, out, log_sum_exp, inputs[11])


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = sdpa.joint_attention_backward(grad_out, *ctx.saved_tensors, *ctx.sequence, None)
    return (*gradients, *(None,) * 9)


@operator("joint_attention", fake=_fake, save=_save_for_backward, backward=_backward)
def _joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None,
    num_image_tokens: int,
    text_first: bool,
    scale: float,
    first_row: int,
    end_row: int,
    direction: str,
    backend: str,
    text_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, this layer's mass (empty without unit weights) and log-sum-exp."""
    chosen = _resolve_backend(backend, query)
    num_text = reference.num_text_keys(query.shape[2], key.shape[2], num_image_tokens)
    check_values(unit_weights, text_lengths, num_text, shortest=int(num_text == key.shape[2]))
    if text_lengths is not None:
        text_lengths = text_lengths.to(query.device)
    out, mass, log_sum_exp = _kernel(chosen, query)(
        query,
        key,
        value,
        unit_weights,
        num_image_tokens=num_image_tokens,
        text_first=text_first,
        scale=scale,
        rows=(first_row, end_row),
        direction=direction,
        text_lengths=text_lengths,
    )
    return out, torch.empty(0, dtype=query.dtype, device=query.device) if mass is None else mass, log_sum_exp
