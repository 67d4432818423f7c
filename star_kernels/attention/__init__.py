"""Joint attention that also returns how much each image token attends to each text unit (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from star_kernels import backends
from star_kernels._checks import check_choice, check_number, check_reverse_mode, check_tensor
from star_kernels.attention import cpu, reference
from star_kernels.attention.mass import DIRECTIONS as DIRECTIONS
from star_kernels.attention.mass import add_layer, autocast, check_mass, check_values

KERNELS: tuple[str, ...] = ("cpu", "triton")
_MAX_HEAD_DIM_TRITON = 128


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None = None,
    *,
    num_image_tokens: int,
    text_first: bool = False,
    scale: float | None = None,
    mass: Tensor | None = None,
    layer_weight: float = 1.0,
    rows: tuple[int, int] | None = None,
    direction: Literal["image_to_text", "text_to_image"] = "image_to_text",
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
        key, value: [B, heads, N_keys, D], dtype and device of `query`. N_keys = N unless all queries are image tokens.
            Under ``torch.autocast`` the three are cast as ``scaled_dot_product_attention`` casts them.
        unit_weights: U, [rows, N_text, K], any of the same dtypes, finite and >= 0, or None to capture nothing. The
            values are checked on the CPU only: on a GPU the check would have to wait for the device.
        num_image_tokens: how many of the N queries are image tokens, 1 to N.
        text_first: the text tokens stand before the image tokens (FLUX) and not behind them (SD3).
        scale: positive factor of the logits, by default D ** -0.5.
        mass: [rows, num_image_tokens, K] float32 (float64 if `query` and `unit_weights` both are), without gradient.
            This layer's mass is added to it in place, and it is returned: one buffer serves all layers of a step.
        layer_weight: finite number >= 0 that this layer's mass is multiplied by; 1/layers in each gives the mean.
        rows: half-open range (first, end) of batch rows that are captured, by default all; `unit_weights` and `mass`
            then have end - first rows. Under guidance: the conditional half.
        direction: ``image_to_text`` for M, how much image token i attends to the unit; ``text_to_image`` for T, how
            much the unit's tokens attend to image token i (it needs text queries).
        backend: ``auto``, ``triton``, ``cpu`` or ``reference``. float64 is computed by the reference under ``auto`` and
            ``cpu``: it is for checks of derivatives.

    Returns:
        out [B, heads, N, D] in the dtype of `query`, and the mass [rows, num_image_tokens, K], or None without
        `unit_weights`. The mass carries no gradient. Second derivatives are not implemented; torch.func and
        forward-mode derivatives are out of scope and raise NotImplementedError.

    The backward pass is PyTorch's flash backward. On CUDA it is reproducible bit for bit only under
    ``torch.use_deterministic_algorithms(True)``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong rank, shape, device or value, a zero-size input, an unknown backend or direction.
        RuntimeError: the backend asked for cannot run here.
    """
    check_tensor("query", query, ("B", "heads", "N", "D"))
    batch, heads, num_queries, head_dim = query.shape
    check_tensor("key", key, (batch, heads, "N_keys", head_dim), device=query.device)
    num_keys = key.shape[2]
    check_tensor("value", value, (batch, heads, num_keys, head_dim), device=query.device)
    query, key, value = autocast(query), autocast(key), autocast(value)
    check_tensor("key", key, key.shape, dtypes=(query.dtype,))
    check_tensor("value", value, value.shape, dtypes=(query.dtype,))

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
    check_choice("direction", direction, DIRECTIONS)
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a str, got {type(backend).__name__}")
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
    out, layer_mass, _ = _joint_attention(
        query, key, value, unit_weights, num_image_tokens, text_first, scale, first, end, direction, backend
    )
    if unit_weights is None:
        return out, None
    return out, add_layer(mass, layer_mass, layer_weight)


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


@torch.library.custom_op("star_kernels::joint_attention", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """out, this layer's mass (empty without unit weights) and log-sum-exp."""
    chosen = _resolve_backend(backend, query)
    check_values(unit_weights, None, 0)
    # float64 is for checks of derivatives, and precise rather than fast: the reference computes it for every backend.
    if chosen != "reference" and query.dtype != torch.float64:
        out, mass, log_sum_exp = _kernel(chosen)(
            query,
            key,
            value,
            unit_weights,
            num_image_tokens=num_image_tokens,
            text_first=text_first,
            scale=scale,
            rows=(first_row, end_row),
            direction=direction,
        )
        return out, query.new_empty(0) if mass is None else mass, log_sum_exp
    text_row_weights = unit_weights if direction == "text_to_image" else None
    with torch.autocast(query.device.type, enabled=False):
        out, mass, log_sum_exp = reference.joint_attention(
            query,
            key,
            value,
            unit_weights if text_row_weights is None else None,
            num_image_tokens=num_image_tokens,
            text_first=text_first,
            scale=scale,
            rows=(first_row, end_row),
        )
        if text_row_weights is not None:
            mass = reference.text_to_image_mass(
                query[first_row:end_row],
                key[first_row:end_row],
                text_row_weights,
                num_image_tokens=num_image_tokens,
                text_first=text_first,
                scale=scale,
            )
    return out, query.new_empty(0) if mass is None else mass, log_sum_exp


def _resolve_backend(backend: str, query: Tensor) -> str:
    if query.shape[3] <= _MAX_HEAD_DIM_TRITON:
        return backends.resolve_backend("joint_attention", backend, query.device, KERNELS)
    name = f"joint_attention with head dimension {query.shape[3]}"
    return backends.resolve_backend(name, backend, query.device, tuple(k for k in KERNELS if k != "triton"))


def _kernel(backend: str) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:
    if backend == "cpu":
        return cpu.joint_attention
    # Not at the top: importing the library loads torch alone.
    from star_kernels.attention import triton_kernels

    return triton_kernels.joint_attention


@_joint_attention.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    log_sum_exp = query.new_empty(query.shape[:3], dtype=reference.statistics_dtype(query))
    if unit_weights is None:
        mass = query.new_empty(0)
    else:
        shape = (end_row - first_row, num_image_tokens, unit_weights.shape[2])
        mass = query.new_empty(shape, dtype=reference.statistics_dtype(query, unit_weights))
    return torch.empty_like(query), mass, log_sum_exp


@torch.library.custom_op("star_kernels::joint_attention_backward", mutates_args=())
def _joint_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key and value, each with its tokens outside its heads in memory, as SDPA lays them out."""
    flash = _flash_backward(query)
    with torch.autocast(query.device.type, enabled=False):
        if flash is None:
            gradients = reference.attention_backward(grad_out, query, key, value, out, log_sum_exp, scale)
        else:
            # The flash kernels walk rows of D numbers that lie side by side.
            rows = [t if t.stride(-1) == 1 else t.contiguous() for t in (grad_out, query, key, value, out)]
            gradients = flash(*rows, log_sum_exp, scale)
    query_gradient, key_gradient, value_gradient = (
        gradient.transpose(1, 2).contiguous().transpose(1, 2) for gradient in gradients
    )
    return query_gradient, key_gradient, value_gradient


@_joint_attention_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    def gradient_of(tensor: Tensor) -> Tensor:
        batch, heads, tokens, head_dim = tensor.shape
        return tensor.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)

    return gradient_of(query), gradient_of(key), gradient_of(value)


def _flash_backward(query: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """PyTorch's flash backward for tensors like `query`, or None where it has none."""
    if query.device.type == "cpu":
        return _flash_backward_cpu
    if (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    ):
        return _flash_backward_cuda
    return None


def _flash_backward_cpu(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, log_sum_exp, 0.0, False, scale=scale
    )


def _flash_backward_cuda(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # The state of the random numbers is read only with dropout; it has the form that the forward pass gives it.
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    offset = torch.zeros((), dtype=torch.uint64, device=query.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        log_sum_exp,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        False,
        seed,
        offset,
        scale=scale,
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, ctx.scale = inputs[0], inputs[1], inputs[2], inputs[6]
    out, mass, log_sum_exp = output
    ctx.mark_non_differentiable(mass, log_sum_exp)
    ctx.save_for_backward(query, key, value, out, log_sum_exp)


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _joint_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return (*gradients, *(None,) * 8)


_joint_attention.register_autograd(_backward, setup_context=_save_for_backward)
