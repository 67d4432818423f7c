"""Arguments of `policy_loss` as a training step passes them: a rollout, and a velocity that moved a little since."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import transition_coefficients, transition_log_prob, transition_step


def make_case(
    *,
    seed: int = 0,
    batch: int = 3,
    channels: int = 4,
    grid: tuple[int, int] = (3, 4),
    patch: tuple[int, int] = (2, 2),
    dtype: torch.dtype = torch.float32,
    move: float = 1e-2,
    masked: bool = True,
) -> dict[str, Any]:
    """Latents [batch, channels, grid·patch] in `dtype`; float32 for the rest, or float64 with a float64 `dtype`.

    `move` is how far the velocity is from the one that drew the sample: 0 is on policy.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    height, width = grid[0] * patch[0], grid[1] * patch[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def latent() -> Tensor:
        return normal(batch, channels, height, width).to(dtype)

    sigma = torch.linspace(0.95, 0.3, batch, dtype=exact)
    coefficients = transition_coefficients("flow_sde", sigma, 0.8 * sigma)
    velocity, sample = latent(), latent()
    next_sample = transition_step(velocity, sample, coefficients, noise=latent()).next_sample
    weights = torch.rand(batch, *grid, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, height, width, generator=generator) > 0.3
    mask[:, 0, 0] = True
    return {
        "velocity": (velocity.double() + move * latent().double()).to(dtype),
        "sample": sample,
        "next_sample": next_sample,
        "old_log_prob": transition_log_prob(velocity, sample, next_sample, coefficients),
        "advantage": normal(batch).to(exact),
        "coefficients": coefficients,
        "weights": (weights / weights.mean((1, 2), keepdim=True)).to(exact),
        "mask": mask if masked else None,
        "reference_velocity": (velocity.double() + 0.1 * latent().double()).to(dtype),
        "kl_weight": 0.05,
        "clip_range": (2e-3, 5e-3),
    }
