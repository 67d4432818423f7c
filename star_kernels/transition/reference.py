"""The transition in plain PyTorch: the definition of the operator (docs/method.md, section 2).

Latents are [B, C, H, W] in any floating dtype and the scalars a, b, s are [B]. Arithmetic is in float32, or in float64
when every floating argument is float64. These functions can be differentiated by autograd.
"""

from __future__ import annotations

from torch import Tensor

from .._gaussian import compute_dtype, guided_velocity, log_prob, per_sample, transition_mean


def transition_step(
    velocity: Tensor,
    sample: Tensor,
    noise: Tensor | None,
    unconditional_velocity: Tensor | None,
    sample_scale: Tensor,
    velocity_scale: Tensor,
    std: Tensor,
    *,
    guidance_scale: float,
) -> tuple[Tensor, Tensor | None]:
    """x' = μ + s·ε in the sample's dtype, and the log-prob [B, H, W] of that rounded x'; without ε, x' = μ and None."""
    mean = _mean(velocity, sample, noise, unconditional_velocity, sample_scale, velocity_scale, std, guidance_scale)
    if noise is None:
        return mean.to(sample.dtype), None
    next_sample = (mean + per_sample(std, mean.dtype) * noise.to(mean.dtype)).to(sample.dtype)
    return next_sample, log_prob(next_sample.to(mean.dtype) - mean, std)


def transition_log_prob(
    velocity: Tensor,
    sample: Tensor,
    next_sample: Tensor,
    unconditional_velocity: Tensor | None,
    sample_scale: Tensor,
    velocity_scale: Tensor,
    std: Tensor,
    *,
    guidance_scale: float,
) -> Tensor:
    """logp_i [B, H, W] of a given next sample."""
    mean = _mean(
        velocity, sample, next_sample, unconditional_velocity, sample_scale, velocity_scale, std, guidance_scale
    )
    return log_prob(next_sample.to(mean.dtype) - mean, std)


def transition_log_prob_gradients(
    grad_log_prob: Tensor,
    velocity: Tensor,
    sample: Tensor,
    next_sample: Tensor,
    unconditional_velocity: Tensor | None,
    sample_scale: Tensor,
    velocity_scale: Tensor,
    std: Tensor,
    *,
    guidance_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to v, x and x': ∂logp_i/∂μ = (x' − μ)/(s²C), and μ = a·x + b·(v_u + g·(v − v_u))."""
    mean = _mean(
        velocity, sample, next_sample, unconditional_velocity, sample_scale, velocity_scale, std, guidance_scale
    )
    dtype = mean.dtype
    scaled = grad_log_prob.to(dtype) / (velocity.shape[1] * std.to(dtype) ** 2)[:, None, None]
    grad_mean = (next_sample.to(dtype) - mean) * scaled[:, None]
    return (
        (guidance_scale * per_sample(velocity_scale, dtype) * grad_mean).to(velocity.dtype),
        (per_sample(sample_scale, dtype) * grad_mean).to(sample.dtype),
        (-grad_mean).to(next_sample.dtype),
    )


def _mean(
    velocity: Tensor,
    sample: Tensor,
    other: Tensor | None,
    unconditional_velocity: Tensor | None,
    sample_scale: Tensor,
    velocity_scale: Tensor,
    std: Tensor,
    guidance_scale: float,
) -> Tensor:
    """μ in the dtype that all arguments of the call lead to; `other` is its remaining latent."""
    dtype = compute_dtype(velocity, sample, other, unconditional_velocity, sample_scale, velocity_scale, std)
    unconditional = None if unconditional_velocity is None else unconditional_velocity.to(dtype)
    guided = guided_velocity(velocity.to(dtype), unconditional, guidance_scale)
    return transition_mean(guided, sample.to(dtype), sample_scale, velocity_scale)
