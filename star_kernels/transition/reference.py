"""The transition in plain PyTorch: the definition of the operator (docs/method.md, section 2).

Latents are [B, C, H, W] in any floating dtype and the scalars a−1, b, s are [B], or [1] for all samples. Arithmetic is
in float32, or in float64 when every floating argument is float64. These functions can be differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._gaussian import (
    compute_dtype,
    guided_velocity,
    log_prob,
    mean_deviation,
    per_sample,
    transition_shift,
)


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
    """x' = μ + s·ε in the sample's dtype, and the log-prob [B, H, W] of that rounded x'; without ε, x' = μ and None."""
    shift = _shift(velocity, sample, noise, unconditional_velocity, sample_drift, velocity_scale, std, guidance_scale)
    dtype = shift.dtype
    mean = sample.to(dtype) + shift
    if noise is None:
        return mean.to(sample.dtype), None
    next_sample = (mean + per_sample(std, dtype) * noise.to(dtype)).to(sample.dtype)
    return next_sample, log_prob(mean_deviation(next_sample.to(dtype), sample.to(dtype), shift), std)


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
    shift = _shift(
        velocity, sample, next_sample, unconditional_velocity, sample_drift, velocity_scale, std, guidance_scale
    )
    return log_prob(mean_deviation(next_sample.to(shift.dtype), sample.to(shift.dtype), shift), std)


def transition_log_prob_gradients(
    grad_log_prob: Tensor,
    velocity: Tensor,
    sample: Tensor,
    next_sample: Tensor,
    unconditional_velocity: Tensor | None,
    sample_drift: Tensor,
    velocity_scale: Tensor,
    std: Tensor,
    *,
    guidance_scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for those of v, x, x' that are wanted: ∂logp_i/∂μ = (x' − μ)/(s²C), μ = a·x + b·(v_u + g·(v − v_u))."""
    shift = _shift(
        velocity, sample, next_sample, unconditional_velocity, sample_drift, velocity_scale, std, guidance_scale
    )
    dtype = shift.dtype
    scaled = grad_log_prob.to(dtype) / (velocity.shape[1] * per_sample(std, dtype, 2) ** 2)
    grad_mean = mean_deviation(next_sample.to(dtype), sample.to(dtype), shift) * scaled[:, None]
    for_velocity, for_sample, for_next_sample = wanted
    return (
        (guidance_scale * per_sample(velocity_scale, dtype) * grad_mean).to(velocity.dtype) if for_velocity else None,
        ((1 + per_sample(sample_drift, dtype)) * grad_mean).to(sample.dtype) if for_sample else None,
        (-grad_mean).to(next_sample.dtype) if for_next_sample else None,
    )


def _shift(
    velocity: Tensor,
    sample: Tensor,
    other: Tensor | None,
    unconditional_velocity: Tensor | None,
    sample_drift: Tensor,
    velocity_scale: Tensor,
    std: Tensor,
    guidance_scale: float,
) -> Tensor:
    """μ − x in the dtype that all arguments of the call lead to; `other` is its remaining latent."""
    dtype = compute_dtype(velocity, sample, other, unconditional_velocity, sample_drift, velocity_scale, std)
    unconditional = None if unconditional_velocity is None else unconditional_velocity.to(dtype)
    guided = guided_velocity(velocity.to(dtype), unconditional, guidance_scale)
    return transition_shift(guided, sample.to(dtype), sample_drift, velocity_scale)
