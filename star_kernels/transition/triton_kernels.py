"""One step of a sampler with its log-prob, and the log-prob of a given step, on a GPU (docs/method.md, section 2).

Floor. A step reads v, x, ε and v_u where given and writes x' and a log-prob per position; the log-prob alone reads x'
instead and writes no latent. About 15 operations per entry of 2 or 4 bytes: memory binds. [8, 16, 64, 64] in bf16 is
4.3 MB for a step, 1.3 µs at 3.35 TB/s, less than a launch takes; what counts is that it is one.

Design. One program per tile of a sample (`_gaussian_kernels`). The log-prob is that of x' as it is stored, so x' is
rounded before it is looked at.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._gaussian import compute_dtype
from .._gaussian_kernels import (
    OPTIONS,
    Latent,
    Row,
    latents,
    layout,
    load_row,
    load_tile,
    load_velocity,
    log_prob,
    place,
    row,
    rows_or_numbers,
    store_tile,
)
from .._kernel_calls import KernelCall, launch
from .._triton import cast


class _Inputs(NamedTuple):
    velocity: Latent
    sample: Latent
    other: Latent | None  # ε of a step, x' of a log-prob
    unconditional_velocity: Latent | None
    sample_drift: Row
    velocity_scale: Row
    std: Row


@triton.jit
def _transition_kernel(inputs, next_sample, log_probs, layout, guidance_scale: tl.float64):
    """A step into `next_sample` [B, C, H, W], or without it the log-prob of the step that was taken.

    The log-probs go to `log_probs` [B, H, W]; a step without noise has none.
    """
    sample, positions = place(layout)
    velocity = load_velocity(inputs.velocity, inputs.unconditional_velocity, guidance_scale, sample, positions, layout)
    x = load_tile(inputs.sample, sample, positions, layout)
    sample_drift = load_row(inputs.sample_drift, sample, layout)
    b = load_row(inputs.velocity_scale, sample, layout)
    std = load_row(inputs.std, sample, layout)
    shift = sample_drift * x + b * velocity
    y = x + shift
    if inputs.other is not None:
        other = load_tile(inputs.other, sample, positions, layout)
        if next_sample is None:
            y = other
        else:
            y += std * other
    if next_sample is not None:
        stored = cast(y, next_sample.dtype.element_ty)
        store_tile(next_sample, stored, sample, positions, layout)
        y = stored.to(layout.COMPUTE)
    if log_probs is not None:
        values = log_prob((y - x) - shift, std, layout.C)
        tl.store(log_probs + sample.to(tl.int64) * layout.size + positions, values, mask=positions < layout.size)


def transition_step(
    velocity: Tensor,
    sample: Tensor,
    noise: Tensor | None,
    unconditional_velocity: Tensor | None,
    sample_drift: Tensor,
    velocity_scale: Tensor,
    std: Tensor,
    *,
    guidance_scale: float,
) -> tuple[Tensor, Tensor | None]:
    """x' in the sample's dtype, contiguous, and the log-prob [B, H, W] of that x'; without ε, x' = μ and None."""
    given = (velocity, sample, noise, unconditional_velocity)
    rows, numbers = rows_or_numbers((sample_drift, velocity_scale, std), given)
    return launch(prepare_step, (*given, *rows), values=(guidance_scale, *numbers))


def transition_log_prob(
    velocity: Tensor,
    sample: Tensor,
    next_sample: Tensor,
    unconditional_velocity: Tensor | None,
    sample_drift: Tensor,
    velocity_scale: Tensor,
    std: Tensor,
    *,
    guidance_scale: float,
) -> Tensor:
    """logp_i [B, H, W] of a given next sample."""
    given = (velocity, sample, next_sample, unconditional_velocity)
    rows, numbers = rows_or_numbers((sample_drift, velocity_scale, std), given)
    return launch(prepare_log_prob, (*given, *rows), values=(guidance_scale, *numbers))


def prepare_step(
    velocity: Tensor, sample: Tensor, noise: Tensor | None, *others: Any
) -> tuple[tuple[Tensor, Tensor | None], list[KernelCall]]:
    """The outputs of `transition_step`, not yet written, and the kernel that writes them."""
    next_sample = torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
    log_probs = None if noise is None else _empty_log_probs(velocity, sample, noise, *others)
    call = kernel_call("step", velocity, sample, noise, *others, next_sample=next_sample, log_probs=log_probs)
    return (next_sample, log_probs), [call]


def prepare_log_prob(*arguments: Any) -> tuple[Tensor, list[KernelCall]]:
    """The output of `transition_log_prob`, not yet written, and the kernel that writes it."""
    log_probs = _empty_log_probs(*arguments)
    return log_probs, [kernel_call("log-prob", *arguments, next_sample=None, log_probs=log_probs)]


def _empty_log_probs(*arguments: Any) -> Tensor:
    batch, _, height, width = arguments[0].shape
    dtype = compute_dtype(*arguments[:7], *arguments[8:])
    return torch.empty((batch, height, width), dtype=dtype, device=arguments[0].device)


def kernel_call(
    name: str,
    velocity: Tensor,
    sample: Tensor,
    other: Tensor | None,
    unconditional_velocity: Tensor | None,
    sample_drift: Tensor | None,
    velocity_scale: Tensor | None,
    std: Tensor | None,
    guidance_scale: float,
    *numbers: float,
    next_sample: Tensor | None,
    log_probs: Tensor | None,
) -> KernelCall:
    """What computes `next_sample` from the noise `other`, or for None the log-prob of the next sample `other`.

    The coefficients are tensors, or else `numbers`.
    """
    scalars = (sample_drift, velocity_scale, std)
    dtype = compute_dtype(velocity, sample, other, unconditional_velocity, *scalars, *numbers)
    views, flat = latents(velocity, sample, other, unconditional_velocity)
    divided = layout(velocity.shape, dtype, flat)
    arguments: dict[str, Any] = {
        "inputs": _Inputs(*views, *(row(given) for given in numbers or scalars)),
        "next_sample": next_sample,
        "log_probs": log_probs,
        "layout": divided,
        "guidance_scale": guidance_scale,
    }
    return KernelCall(name, _transition_kernel, (len(velocity) * divided.tiles,), arguments, OPTIONS)


def ahead_of_time_calls(architecture: str) -> list[KernelCall]:
    """The kernel's uses on tensors without memory, to be compiled; one configuration serves all architectures."""
    batch, height, width = 8, 64, 64
    drift, scale, std = (torch.empty(batch, device="meta") for _ in range(3))
    log_probs = torch.empty((batch, height, width), device="meta")
    calls = []
    for name, dtype, channels, memory_format in (
        ("step, bf16, C 16, guidance", torch.bfloat16, 16, torch.contiguous_format),
        ("step, bf16, C 16, guidance, channels last", torch.bfloat16, 16, torch.channels_last),
        ("log-prob, fp32, C 32, guidance", torch.float32, 32, torch.contiguous_format),
    ):
        shape = (batch, channels, height, width)
        v, x, other, base = (
            torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format) for _ in range(4)
        )
        next_sample = torch.empty(shape, dtype=dtype, device="meta") if name.startswith("step") else None
        options: dict[str, Any] = {"next_sample": next_sample, "log_probs": log_probs}
        calls.append(kernel_call(name, v, x, other, base, drift, scale, std, 4.5, **options))
    return calls
