"""Attention mass beside any attention, from its log-sum-exp (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from star_kernels import backends
from star_kernels._checks import check_choice, check_number, check_reverse_mode, check_tensor
from star_kernels._operators import is_traced, operator
from star_kernels.attention import cpu, reference

DIRECTIONS = ("image_to_text", "text_to_image")
KERNELS: tuple[str, ...] = ("cpu", "triton")


def attention_mass(
    query: Tensor,
    key: Tensor,
    unit_weights: Tensor,
    log_sum_exp: Tensor,
    *,
    scale: float | None = None,
    text_lengths: Tensor | None = None,
    mass: Tensor | None = None,
    layer_weight: float = 1.0,
    direction: Literal["image_to_text", "text_to_image"] = "image_to_text",
    backend: str = "auto",
) -> Tensor:
    """How much each image token attends to each text unit, beside an attention that something else computes.

    Any attention will do that returns the log-sum-exp of its logits. With it the softmax of a pair of tokens is
    P = exp(scale·q·k − L), at most 1, and only the pairs of image and text tokens are computed
    (docs/method.md, section 3, "Mass from the log-sum-exp").

    Args:
        query: [rows, heads, N_image, D], the image tokens' queries, float32, bfloat16, float16 or float64, any strides.
        key: [rows, heads, N_text, D], the text tokens' keys, dtype and device of `query`. Under ``torch.autocast`` both
            are cast as ``scaled_dot_product_attention`` casts them.
        unit_weights: U, [rows, N_text, K], any of the same dtypes, finite and >= 0. The values are checked on the CPU
            only: on a GPU the check would have to wait for the device.
        log_sum_exp: L, [rows, heads, N_image] float32 (float64 for a float64 `query`), any strides: natural logarithm
            of the sum over *all* keys, image and text, of exp(scale·q·k).
        scale: positive factor of the logits, by default D ** -0.5.
        text_lengths: [rows] int32 or int64, 0 to N_text (checked on the CPU only), on the device of `query` or the CPU:
            text tokens from there on count nothing. By default all count.
        mass: [rows, N_image, K] float32 (float64 if `query` and `unit_weights` both are), without gradient. This
            layer's mass is added to it in place, and it is returned: one buffer serves all layers of a step.
        layer_weight: finite number >= 0 that this layer's mass is multiplied by; 1/layers in each gives the mean.
        direction: ``image_to_text`` for M as above. ``text_to_image`` for T, how much a unit's tokens attend to image
            token i: `query` are then the text tokens' queries [rows, heads, N_text, D], `key` the image tokens' keys
            [rows, heads, N_image, D], `log_sum_exp` that of the text tokens [rows, heads, N_text].
        backend: ``auto``, ``triton``, ``cpu`` or ``reference``. float64 is computed by the reference under ``auto`` and
            ``cpu``.

    Returns:
        The mass [rows, N_image, K], mean over heads, without gradient. It is the same bit for bit whatever else is in
        the batch, and for any padding behind `text_lengths`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong rank, shape, device or value, a zero-size input, an unknown backend or direction.
        RuntimeError: the backend asked for cannot run here.
    """
    check_choice("direction", direction, DIRECTIONS)
    to_text = direction == "image_to_text"
    check_tensor("query", query, ("rows", "heads", "N_image" if to_text else "N_text", "D"))
    rows, heads, num_queries, head_dim = query.shape
    check_tensor("key", key, (rows, heads, "N_text" if to_text else "N_image", head_dim), device=query.device)
    query, key = autocast(query), autocast(key)
    check_tensor("key", key, key.shape, dtypes=(query.dtype,))
    num_image, num_text = (num_queries, key.shape[2]) if to_text else (key.shape[2], num_queries)
    check_tensor("unit_weights", unit_weights, (rows, num_text, "K"), device=query.device)
    statistics = (reference.statistics_dtype(query),)
    check_tensor("log_sum_exp", log_sum_exp, (rows, heads, num_queries), dtypes=statistics, device=query.device)
    scale = head_dim**-0.5 if scale is None else check_number("scale", scale, low=0, low_open=True)
    check_text_lengths(text_lengths, rows, query.device)
    layer_weight = check_number("layer_weight", layer_weight, low=0)
    if mass is not None:
        check_mass(mass, (rows, num_image, unit_weights.shape[2]), query, unit_weights)
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a str, got {type(backend).__name__}")
    check_reverse_mode("attention_mass", (query, key, unit_weights, log_sum_exp, mass))
    layer_mass = _attention_mass(query, key, unit_weights, log_sum_exp, scale, direction, text_lengths, backend)
    return add_layer(mass, layer_mass, layer_weight)


def mass_beside(
    query: Tensor,
    key: Tensor,
    unit_weights: Tensor,
    log_sum_exp: Tensor,
    *,
    num_image_tokens: int,
    text_first: bool,
    rows: slice,
    text_lengths: Tensor | None,
    direction: Literal["image_to_text", "text_to_image"],
    scale: float | None = None,
    mass: Tensor | None = None,
    layer_weight: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """`attention_mass` with these options, of the rows `rows` of the tensors that an attention was called with."""
    tensors = (autocast(query), autocast(key), unit_weights, log_sum_exp)
    if text_lengths is None and not is_traced(tensors) and _runs_triton(tensors[0], backend):
        from star_kernels.attention import mass_kernels

        check_values(unit_weights, None, 0)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        tokens = (num_image_tokens, text_first, rows.start, rows.stop, direction)
        return add_layer(mass, mass_kernels.attention_mass_beside(*tensors, None, *tokens, scale), layer_weight)
    queries, keys = reference.captured_tokens(query.shape[2], key.shape[2], num_image_tokens, text_first, direction)
    return attention_mass(
        query.detach()[rows, :, queries],
        key.detach()[rows, :, keys],
        unit_weights.detach(),
        log_sum_exp[rows, :, queries],
        text_lengths=None if text_lengths is None else text_lengths[rows],
        direction=direction,
        scale=scale,
        mass=mass,
        layer_weight=layer_weight,
        backend=backend,
    )


def _runs_triton(query: Tensor, backend: str) -> bool:
    chosen = backends.resolve_backend("attention_mass", backend, query.device, KERNELS)
    return chosen == "triton" and query.dtype != torch.float64


def add_layer(mass: Tensor | None, layer_mass: Tensor, layer_weight: float) -> Tensor:
    """A layer's mass times its weight, added in place to a `mass` that is there.

    This stands here and not in the op, because torch.library has autograd for functional ops only. The price is one
    read and write of [rows, image, K] numbers, nothing beside attention itself.
    """
    if mass is not None:
        return mass.add_(layer_mass, alpha=layer_weight)
    return layer_mass if layer_weight == 1 else layer_mass * layer_weight


def autocast(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype that autocast would give it in ``scaled_dot_product_attention``."""
    device_type = tensor.device.type
    # By name: torch.amp.is_autocast_available breaks the graph of torch.compile in PyTorch 2.11.
    if device_type not in ("cpu", "cuda", "xpu") or not torch.is_autocast_enabled(device_type):
        return tensor
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device_type))


def check_mass(mass: Tensor, shape: tuple[int, int, int], query: Tensor, unit_weights: Tensor) -> None:
    dtype = reference.statistics_dtype(query, unit_weights)
    check_tensor("mass", mass, shape, dtypes=(dtype,), device=query.device)
    if mass.requires_grad:
        raise ValueError("mass: expected a buffer that requires no gradient, got one with requires_grad=True")
    if any(stride == 0 and size > 1 for stride, size in zip(mass.stride(), mass.shape, strict=True)):
        raise ValueError(f"mass: expected a buffer with memory for each element, got an expanded one {mass.stride()}")


def check_text_lengths(text_lengths: Tensor | None, batch: int, device: torch.device) -> None:
    """All but the values, which an operator looks at: torch.compile could not trace that."""
    if text_lengths is None:
        return
    check_tensor("text_lengths", text_lengths, (batch,), dtypes=(torch.int32, torch.int64))
    if text_lengths.device not in (device, torch.device("cpu")):
        raise ValueError(f"text_lengths: expected a tensor on {device} or the CPU, got one on {text_lengths.device}")


def check_values(unit_weights: Tensor | None, text_lengths: Tensor | None, num_text: int, *, shortest: int = 0) -> None:
    """Of what lies on the CPU."""
    if unit_weights is not None and unit_weights.device.type == "cpu":
        smallest, largest = (bound.item() for bound in torch.aminmax(unit_weights))
        # Written so that NaN, which aminmax passes on, fails both.
        if not (smallest >= 0 and largest < float("inf")):
            raise ValueError(f"unit_weights: expected finite values >= 0, got values from {smallest} to {largest}")
    if text_lengths is not None and text_lengths.device.type == "cpu":
        lowest, highest = (bound.item() for bound in torch.aminmax(text_lengths))
        if not shortest <= lowest <= highest <= num_text:
            raise ValueError(f"text_lengths: expected values from {shortest} to {num_text}, got {lowest} to {highest}")


def _fake_mass(
    query: Tensor, key: Tensor, unit_weights: Tensor, log_sum_exp: Tensor, scale: float, direction: str, *_: Any
) -> Tensor:
    num_image = (query if direction == "image_to_text" else key).shape[2]
    shape = (query.shape[0], num_image, unit_weights.shape[2])
    return query.new_empty(shape, dtype=reference.statistics_dtype(query, unit_weights))


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


@operator("attention_mass", fake=_fake_mass, save=_no_gradient, backward=lambda ctx, _: (None,) * 8)
def _attention_mass(
    query: Tensor,
    key: Tensor,
    unit_weights: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    direction: str,
    text_lengths: Tensor | None,
    backend: str,
) -> Tensor:
    chosen = backends.resolve_backend("attention_mass", backend, query.device, KERNELS)
    check_values(unit_weights, text_lengths, unit_weights.shape[1])
    if text_lengths is not None:
        text_lengths = text_lengths.to(query.device).contiguous()
    run = _kernel(chosen, query)
    return run(query, key, unit_weights, log_sum_exp, scale=scale, text_lengths=text_lengths, direction=direction)


def _kernel(backend: str, query: Tensor) -> Callable[..., Tensor]:
    # float64 is for checks of derivatives, and precise rather than fast: the reference computes it for every backend.
    if backend == "reference" or query.dtype == torch.float64:
        return torch.autocast(query.device.type, enabled=False)(reference.attention_mass)
    if backend == "cpu":
        return cpu.attention_mass
    # Not at the top: importing the library loads torch alone.
    from star_kernels.attention import mass_kernels

    return mass_kernels.attention_mass
