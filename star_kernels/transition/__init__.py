"""One step of a sampler and the log-prob of the step at every latent position (docs/method.md, section 2)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .. import backends
from .._checks import check_reverse_mode, check_tensor
from .._gaussian import (
    TransitionCoefficients,
    check_coefficients,
    check_guidance,
    compute_dtype,
    per_sample,
)
from .._operators import operator
from . import cpu, reference
from .coefficients import transition_coefficients

__all__ = [
    "TransitionCoefficients",
    "TransitionStep",
    "transition_coefficients",
    "transition_log_prob",
    "transition_step",
]


KERNELS = ("triton", "cpu")


class TransitionStep(NamedTuple):
    """The next sample [B, C, H, W] and its log-prob [B, H, W], which is None for a step without noise."""

    next_sample: Tensor
    log_prob: Tensor | None


def transition_step(
    velocity: Tensor,
    sample: Tensor,
    coefficients: TransitionCoefficients,
    *,
    noise: Tensor | None,
    unconditional_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    backend: str = "auto",
) -> TransitionStep:
    """Draw x' = a·x + b·v + s·ε and the log-prob of what was drawn (docs/method.md, section 2).

    The next sample is rounded to the sample's dtype first, and the log-prob is that of the rounded one: it is what
    `transition_log_prob` gives for the latent that is stored, bit for bit.

    Gradients reach `velocity` and `sample` through `next_sample` (rounding counts as the identity). The log-prob of a
    step's own draw depends on the noise alone, so it carries none. All other inputs are constants, the unconditional
    velocity too. torch.func and forward-mode derivatives are out of scope and raise NotImplementedError.

    Args:
        velocity: predicted velocity (ddim: predicted noise) [B, C, H, W]; float32, bfloat16, float16 or float64.
        sample: current latent x, same shape; its dtype may differ.
        coefficients: from `transition_coefficients`, with B rows, or one row for all samples, which may be on the CPU
            wherever the latents are.
        noise: ε ~ N(0, I), same shape as `sample`. May be None for coefficients without noise, which ignore it.
        unconditional_velocity: v_u for guidance, same shape, or None.
        guidance_scale: g ≥ 0 in v = v_u + g·(v − v_u); must be 1 without `unconditional_velocity`.
        backend: ``auto``, ``triton``, ``cpu`` (the C++ kernel; a float64 latent runs on the reference) or
            ``reference``.

    Returns:
        TransitionStep: `next_sample` [B, C, H, W] in the sample's dtype, contiguous; `log_prob` [B, H, W] in float32
        (float64 when every floating input is float64), the mean over channels in nats, or None for coefficients
        without noise.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, an empty one, `noise` missing
            although the coefficients have noise, or guidance without an unconditional velocity.
        RuntimeError: a backend that cannot run here, with the reason.
    """
    batch = _check_latents(velocity, sample)
    scale = check_guidance(velocity, unconditional_velocity, guidance_scale)
    rows = check_coefficients(coefficients, batch, velocity.device)
    if noise is not None:
        check_tensor("noise", noise, sample.shape, device=sample.device)
    elif rows.stochastic:
        raise ValueError(f"noise: expected a tensor {list(sample.shape)}, {rows.kind} steps have noise, got None")
    tensors = (
        velocity,
        sample,
        noise if rows.stochastic else None,
        unconditional_velocity,
        rows.sample_drift,
        rows.velocity_scale,
        rows.std,
    )
    check_reverse_mode("transition_step", tensors)
    next_sample, log_prob = _transition_step(*tensors, scale, backend)
    return TransitionStep(next_sample, log_prob if rows.stochastic else None)


def transition_log_prob(
    velocity: Tensor,
    sample: Tensor,
    next_sample: Tensor,
    coefficients: TransitionCoefficients,
    *,
    unconditional_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Log-prob of a given next sample at every position, the mean over channels (docs/method.md, section 2).

    Its mean over positions is the image-level log-prob of Flow-GRPO. Gradients reach `velocity`, `sample` and
    `next_sample`; the unconditional velocity and the coefficients are constants. torch.func and forward-mode
    derivatives are out of scope and raise NotImplementedError.

    Args:
        velocity: predicted velocity (ddim: predicted noise) [B, C, H, W]; float32, bfloat16, float16 or float64.
        sample: current latent x, same shape; its dtype may differ.
        next_sample: the latent x' whose log-prob is wanted, same shape; its dtype may differ.
        coefficients: from `transition_coefficients`, with B rows, or one row for all samples, which may be on the CPU
            wherever the latents are.
        unconditional_velocity: v_u for guidance, same shape, or None.
        guidance_scale: g ≥ 0 in v = v_u + g·(v − v_u); must be 1 without `unconditional_velocity`.
        backend: ``auto``, ``triton``, ``cpu`` (the C++ kernel; a float64 latent runs on the reference) or
            ``reference``.

    Returns:
        [B, H, W] in nats, float32 (float64 when every floating input is float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, an empty one, coefficients
            without noise, or guidance without an unconditional velocity.
        RuntimeError: a backend that cannot run here, with the reason.
    """
    batch = _check_latents(velocity, sample)
    check_tensor("next_sample", next_sample, sample.shape, device=sample.device)
    scale = check_guidance(velocity, unconditional_velocity, guidance_scale)
    rows = check_coefficients(coefficients, batch, velocity.device)
    if not rows.stochastic:
        raise ValueError(f"coefficients: expected steps with noise, got {rows.kind} with s = 0, which has no log-prob")
    tensors = (
        velocity,
        sample,
        next_sample,
        unconditional_velocity,
        rows.sample_drift,
        rows.velocity_scale,
        rows.std,
    )
    check_reverse_mode("transition_log_prob", tensors)
    return _transition_log_prob(*tensors, scale, backend)


def _check_latents(velocity: Tensor, sample: Tensor) -> int:
    check_tensor("velocity", velocity, ("B", "C", "H", "W"))
    check_tensor("sample", sample, velocity.shape, device=velocity.device)
    return velocity.shape[0]


def _implementation(operator: str, backend: str, *latents: Tensor | None) -> Any:
    """The module that runs an operator on these latents."""
    device = next(latent.device for latent in latents if latent is not None)
    chosen = backends.resolve_backend(operator, backend, device, KERNELS)
    if chosen == "triton":
        from . import triton_kernels

        return triton_kernels
    return cpu if chosen == "cpu" and cpu.supports(*latents) else reference


def _fake_step(
    velocity, sample, noise, unconditional_velocity, sample_drift, velocity_scale, std, guidance_scale, backend
):
    next_sample = sample.new_empty(sample.shape)
    if noise is None:
        return next_sample, sample.new_empty(0)
    dtype = compute_dtype(velocity, sample, noise, unconditional_velocity, sample_drift, velocity_scale, std)
    batch, _, height, width = sample.shape
    return next_sample, sample.new_empty((batch, height, width), dtype=dtype)


def _save_for_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    velocity, sample, _, _, sample_drift, velocity_scale, _, guidance_scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(sample_drift, velocity_scale)
    ctx.guidance_scale = guidance_scale
    ctx.velocity_dtype, ctx.sample_dtype = velocity.dtype, sample.dtype


def _step_backward(ctx: Any, grad_next_sample: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_velocity = grad_sample = None
    if grad_next_sample is not None:
        sample_drift, velocity_scale = (scalar.detach() for scalar in ctx.saved_tensors)
        dtype = compute_dtype(grad_next_sample, sample_drift, velocity_scale)
        grad = grad_next_sample.to(dtype)
        if ctx.needs_input_grad[0]:
            grad_velocity = (ctx.guidance_scale * per_sample(velocity_scale, dtype) * grad).to(ctx.velocity_dtype)
        if ctx.needs_input_grad[1]:
            grad_sample = ((1 + per_sample(sample_drift, dtype)) * grad).to(ctx.sample_dtype)
    return grad_velocity, grad_sample, None, None, None, None, None, None, None


@operator("transition_step", fake=_fake_step, save=_save_for_step, backward=_step_backward)
def _transition_step(
    velocity: Tensor,
    sample: Tensor,
    noise: Tensor | None,
    unconditional_velocity: Tensor | None,
    sample_drift: Tensor,
    velocity_scale: Tensor,
    std: Tensor,
    guidance_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Next sample, and its log-prob or, without noise, an empty tensor: an operator cannot return None."""
    implementation = _implementation("transition_step", backend, velocity, sample, noise, unconditional_velocity)
    next_sample, log_prob = implementation.transition_step(
        velocity,
        sample,
        noise,
        unconditional_velocity,
        sample_drift,
        velocity_scale,
        std,
        guidance_scale=guidance_scale,
    )
    return next_sample.contiguous(), sample.new_empty(0) if log_prob is None else log_prob


def _fake_log_prob(
    velocity, sample, next_sample, unconditional_velocity, sample_drift, velocity_scale, std, guidance, backend
):
    dtype = compute_dtype(velocity, sample, next_sample, unconditional_velocity, sample_drift, velocity_scale, std)
    batch, _, height, width = sample.shape
    return sample.new_empty((batch, height, width), dtype=dtype)


def _save_for_log_prob(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, guidance_scale, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.guidance_scale = guidance_scale


def _log_prob_backward(ctx: Any, grad_log_prob: Tensor) -> tuple[Tensor | None, ...]:
    velocity, sample, next_sample, *constants = ctx.saved_tensors
    # What is a constant stays one when the gradient is differentiated.
    held: list[Any] = [None if constant is None else constant.detach() for constant in constants]
    gradients = reference.transition_log_prob_gradients(
        grad_log_prob,
        velocity,
        sample,
        next_sample,
        *held,
        guidance_scale=ctx.guidance_scale,
        wanted=ctx.needs_input_grad[:3],
    )
    return (*gradients, None, None, None, None, None, None)


@operator("transition_log_prob", fake=_fake_log_prob, save=_save_for_log_prob, backward=_log_prob_backward)
def _transition_log_prob(
    velocity: Tensor,
    sample: Tensor,
    next_sample: Tensor,
    unconditional_velocity: Tensor | None,
    sample_drift: Tensor,
    velocity_scale: Tensor,
    std: Tensor,
    guidance_scale: float,
    backend: str,
) -> Tensor:
    implementation = _implementation(
        "transition_log_prob", backend, velocity, sample, next_sample, unconditional_velocity
    )
    return implementation.transition_log_prob(
        velocity,
        sample,
        next_sample,
        unconditional_velocity,
        sample_drift,
        velocity_scale,
        std,
        guidance_scale=guidance_scale,
    )
