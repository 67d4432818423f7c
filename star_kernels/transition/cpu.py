"""The calls into csrc/transition.cpp."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(*latents: Tensor | None) -> bool:
    """Whether the kernels read these latents: they have no float64."""
    return not any(latent is not None and latent.dtype == torch.float64 for latent in latents)


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
    """Like the reference."""
    rows = (row.expand(len(velocity)) for row in (sample_drift, velocity_scale, std))
    next_sample, log_prob = torch.ops.star_kernels_cpu.transition_step(
        velocity, sample, noise, unconditional_velocity, *rows, guidance_scale
    )
    return next_sample, None if noise is None else log_prob


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
    """Like the reference."""
    rows = (row.expand(len(velocity)) for row in (sample_drift, velocity_scale, std))
    return torch.ops.star_kernels_cpu.transition_log_prob(
        velocity, sample, next_sample, unconditional_velocity, *rows, guidance_scale
    )
