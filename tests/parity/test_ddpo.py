"""The published DDIM step with log-prob of DDPO's trainers (ddpo-pytorch, trl), number by number, against the library.

The oracle uses nothing but Python floats, from the scheduler's ᾱ: one latent at a time, one formula at a time.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from star_trainer.families.noising import DIFFUSION
from star_trainer.families.pipelines.unet import ddim, ddim_schedule

import star_kernels as sk
from tests.parity.oracle import flat, latents, log_prob

SHAPE = (2, 4, 2, 3)
PUBLISHED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def scheduler(**config: object) -> DDIMScheduler:
    """Stable Diffusion's, made DDIM's as there."""
    settings = {**PUBLISHED, "set_alpha_to_one": False, "clip_sample": False, **config}
    found: DDIMScheduler = ddim(PNDMScheduler.from_config(settings))
    return found


def published_step(
    of: DDIMScheduler, timestep: int, steps: int, eta: float, x: list[float], noise: list[float]
) -> tuple[float, list[float]]:
    """Standard deviation and mean of x_{t-1}, [n] numbers."""
    before = timestep - of.config.num_train_timesteps // steps
    alpha = of.alphas_cumprod[timestep].item()
    alpha_before = of.alphas_cumprod[before].item() if before >= 0 else float(of.final_alpha_cumprod)
    beta, beta_before = 1 - alpha, 1 - alpha_before
    std = eta * math.sqrt((beta_before / beta) * (1 - alpha / alpha_before))
    means = []
    for x_i, noise_i in zip(x, noise, strict=True):
        original = (x_i - math.sqrt(beta) * noise_i) / math.sqrt(alpha)
        direction = math.sqrt(max(1 - alpha_before - std**2, 0.0)) * noise_i
        means.append(math.sqrt(alpha_before) * original + direction)
    return std, means


@pytest.mark.parametrize(("steps", "eta"), [(50, 1.0), (10, 0.5)])
@pytest.mark.parametrize(
    ("config", "even"),
    [
        ({}, False),
        ({"set_alpha_to_one": True}, False),
        ({"steps_offset": 0, "set_alpha_to_one": True}, False),
        ({}, True),
    ],
    ids=["published", "alpha to one", "no offset", "trailing"],
)
def test_every_step_has_the_published_mean_std_and_log_prob(
    steps: int, eta: float, config: dict[str, object], even: bool
) -> None:
    of = scheduler(**config)
    levels, timesteps = ddim_schedule(of, steps, torch.device("cpu"), even=even)
    assert len(levels) == steps + 1 and len(timesteps) == steps
    for index in range(steps):
        guided, x, unconditional, noise = latents(SHAPE, index, 4)
        row = DIFFUSION.step("ddim", levels[index], levels[index + 1], eta=eta)
        options = {"unconditional_velocity": unconditional, "guidance_scale": 5.0}
        result = sk.transition_step(guided, x, row, noise=noise if row.stochastic else None, **options)
        again = sk.transition_log_prob(guided, x, result.next_sample, row, **options) if row.stochastic else None
        prediction = unconditional.double() + 5.0 * (guided.double() - unconditional.double())
        for b, (x_b, noise_b, drawn) in enumerate(
            zip(flat(x), flat(prediction), flat(result.next_sample), strict=True)
        ):
            std, means = published_step(of, int(timesteps[index]), steps, eta, x_b, noise_b)
            assert row.std.item() == pytest.approx(std, rel=1e-5)
            assert row.stochastic == (std > 0.0)
            draws = [mean + std * e for mean, e in zip(means, flat(noise)[b], strict=True)]
            assert drawn == pytest.approx(draws, rel=1e-5, abs=1e-5)
            if row.stochastic:
                assert result.log_prob is not None and again is not None
                published = log_prob(std, means, drawn)
                assert result.log_prob[b].mean().item() == pytest.approx(published, rel=1e-5, abs=1e-5)
                assert again[b].mean().item() == pytest.approx(published, rel=1e-5, abs=1e-5)
