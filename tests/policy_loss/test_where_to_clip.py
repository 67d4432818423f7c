"""How hard a clip pulls back along the last step, by where ratios are taken (docs/method.md, "Where to clip")."""

from __future__ import annotations

import pytest
import torch

import star_kernels as sk

SAMPLES, CHANNELS, STEP = 20_000, 2, 1e-3


def pulls(side: int, weights: torch.Tensor | None) -> dict[str, tuple[float, float]]:
    """By granularity: the clip fraction, and what clipping adds to the gradient along the last step.

    Advantages say nothing of the noise: without a clip the gradient is noise alone.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (SAMPLES, CHANNELS, side, side)
    row = sk.transition_coefficients("dance_sde", torch.tensor([0.7]), torch.tensor([0.5]))
    old = torch.zeros(shape)
    sample, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    advantage = torch.randint(0, 2, (SAMPLES,), generator=generator) * 2.0 - 1.0
    drawn = sk.transition_step(old, sample, row, noise=noise)
    # The same step in every sample, as a model makes it, of so many standard deviations of the sampler.
    scale = float(row.std / row.velocity_scale.abs())
    last = STEP * scale * torch.randint(0, 2, shape[1:], generator=generator).mul(2).sub(1).float()
    # The log-ratio of a position has the spread STEP/√C, an image's √(HW) less: the range clips a tenth of them.
    at_a_position = 1.645 * STEP / CHANNELS**0.5
    found = {}
    for granularity, clip_range in (("position", at_a_position), ("image", at_a_position / side)):

        def gradient(objective: str, granularity: str = granularity, clip_range: float = clip_range):
            velocity = (old + last).requires_grad_()
            result = sk.policy_loss(
                velocity,
                sample,
                drawn.next_sample,
                drawn.log_prob,
                advantage,
                row,
                weights=weights,
                objective=objective,
                clip_range=clip_range,
                granularity=granularity,
            )
            return torch.autograd.grad(result.loss, velocity)[0], float(result.metrics["clip_fraction"])

        (clipped, fraction), (free, _) = gradient("clip"), gradient("none")
        found[granularity] = fraction, float(((clipped - free) * last).sum())
    return found


@pytest.mark.parametrize("side", [4, 8])
def test_a_clip_per_position_pulls_back_harder_by_the_root_of_their_number(side: int) -> None:
    found = pulls(side, None)
    (one, position), (other, image) = found["position"], found["image"]
    assert one == pytest.approx(0.1, abs=0.005) and other == pytest.approx(0.1, abs=0.005)
    assert image > 0, "a step down the gradient goes against the last one"
    assert position / image == pytest.approx(side, rel=0.1)


def test_a_map_changes_neither_how_many_images_are_clipped_nor_how_hard_they_pull() -> None:
    weights = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1)).pow(4).expand(SAMPLES, 8, 8)
    weights = (weights / weights.mean((-2, -1), keepdim=True)).contiguous()
    spread = float(weights[0].square().mean().sqrt())
    assert spread > 1.3
    (fraction, weighted), (_, even) = pulls(8, weights)["image"], pulls(8, None)["image"]
    assert fraction == pytest.approx(0.1, abs=0.005)
    # The gradient is longer by the root of the mean squared weight, and so is what clipping takes from it.
    assert weighted / even == pytest.approx(spread, rel=0.15)
