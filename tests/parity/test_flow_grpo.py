"""Flow-GRPO's published step and loss, written out number by number, against the library.

The oracle uses nothing but Python floats: one position at a time, one formula at a time, in its own order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from star_kernels import policy_loss, transition_coefficients, transition_log_prob, transition_step
from tests.parity.oracle import flat, latents
from tests.parity.oracle import log_prob as published_log_prob

SHAPE = (3, 2, 4, 6)
NOISE_LEVEL = 0.7


def schedule(steps: int) -> list[float]:
    """SD3's noise levels, from 1 to 0, as the scheduler holds them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas.tolist()
    assert levels[0] == 1.0 and levels[-1] == 0.0 and len(levels) == steps + 1
    return levels


@dataclass
class PublishedStep:
    """std_dev, mean and log-prob of one sample's step, from its flat latents."""

    std_dev: float
    spread: float
    means: list[float]

    @classmethod
    def of(cls, levels: list[float], index: int, x: list[float], v: list[float]) -> PublishedStep:
        sigma, length = levels[index], levels[index] - levels[index + 1]
        denominator = 1 - (levels[1] if sigma == 1 else sigma)
        std_dev = NOISE_LEVEL * math.sqrt(sigma / denominator)
        half_rate = std_dev**2 / (2 * sigma)
        means = [
            xi - xi * half_rate * length - vi * length - vi * half_rate * (1 - sigma) * length
            for xi, vi in zip(x, v, strict=True)
        ]
        return cls(std_dev, std_dev * math.sqrt(length), means)

    def log_prob(self, drawn: list[float]) -> float:
        return published_log_prob(self.spread, self.means, drawn)


@pytest.mark.parametrize("steps", [10, 40])
def test_every_step_has_the_published_mean_std_and_log_prob(steps: int) -> None:
    levels = schedule(steps)
    sigmas = torch.tensor(levels)
    for index in range(steps):
        v, x, noise = latents(SHAPE, index, 3)
        c = transition_coefficients("flow_sde", sigmas[index], sigmas[index + 1], eta=NOISE_LEVEL, sigma_max=sigmas[1])
        mean = transition_step(v, x, c, noise=torch.zeros(SHAPE)).next_sample
        next_sample, log_prob = transition_step(v, x, c, noise=noise)
        assert log_prob is not None and c.noise_rate is not None
        again = transition_log_prob(v, x, next_sample, c)
        for b, (x_b, v_b, drawn, noise_b) in enumerate(
            zip(flat(x), flat(v), flat(next_sample), flat(noise), strict=True)
        ):
            published = PublishedStep.of(levels, index, x_b, v_b)
            assert c.std.item() == pytest.approx(published.spread, rel=1e-5)
            assert c.noise_rate.item() == pytest.approx(published.std_dev, rel=1e-5)
            assert flat(mean)[b] == pytest.approx(published.means, rel=1e-5, abs=1e-5)
            draws = [m + published.spread * e for m, e in zip(published.means, noise_b, strict=True)]
            assert drawn == pytest.approx(draws, rel=1e-5, abs=1e-5)
            assert log_prob[b].mean().item() == pytest.approx(published.log_prob(drawn), rel=1e-5, abs=1e-5)
            assert again[b].mean().item() == pytest.approx(published.log_prob(drawn), rel=1e-5, abs=1e-5)


@dataclass
class PublishedLoss:
    """Loss, KL and gradient by velocity entry of one training step, in plain numbers."""

    loss: float
    kl: float
    gradient: list[list[float]]

    @classmethod
    def of(
        cls,
        levels: list[float],
        indices: list[int],
        latent: dict[str, list[list[float]]],
        old_log_probs: list[float],
        advantages: list[float],
        clip: float,
        beta: float,
    ) -> PublishedLoss:
        batch = len(indices)
        policy, kl = 0.0, 0.0
        gradient: list[list[float]] = []
        for b, index in enumerate(indices):
            x, v, y, ref = (latent[name][b] for name in ("x", "v", "y", "ref"))
            step, anchor = PublishedStep.of(levels, index, x, v), PublishedStep.of(levels, index, x, ref)
            size, advantage = len(x), advantages[b]
            ratio = math.exp(step.log_prob(y) - old_log_probs[b])
            inside = min(max(ratio, 1 - clip), 1 + clip)
            policy += max(-advantage * ratio, -advantage * inside) / batch
            distances = [m - r for m, r in zip(step.means, anchor.means, strict=True)]
            kl += math.fsum(d * d for d in distances) / size / (2 * step.std_dev**2) / batch
            # The chain rule by hand: the loss of a clipped ratio is flat.
            clipped_away = (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip)
            by_log_prob = 0.0 if clipped_away else -advantage * ratio / batch
            sigma, length = levels[index], levels[index] - levels[index + 1]
            mean_by_velocity = -length - step.std_dev**2 * (1 - sigma) / (2 * sigma) * length
            gradient.append(
                [
                    mean_by_velocity
                    * (by_log_prob * (yi - m) / step.spread**2 / size + beta * d / step.std_dev**2 / size / batch)
                    for yi, m, d in zip(y, step.means, distances, strict=True)
                ]
            )
        return cls(policy + beta * kl, kl, gradient)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("steps", [10, 40])
def test_image_level_loss_and_gradient_are_the_published_ones(steps: int, beta: float) -> None:
    levels = schedule(steps)
    sigmas = torch.tensor(levels)
    clip = 1e-3
    # Ratios well inside, outside above and outside below the clip range, with either sign of the advantage.
    moves = (1e-4, 3e-2, -3e-2)
    for start in range(steps):
        indices = [start, (start + 1) % steps, (start + 4) % steps]
        now = torch.tensor(indices)
        c = transition_coefficients("flow_sde", sigmas[now], sigmas[now + 1], eta=NOISE_LEVEL, sigma_max=sigmas[1])
        v, x, noise, shift, ref_shift = latents(SHAPE, 1000 + start, 5)
        y = transition_step(v, x, c, noise=noise).next_sample
        old = transition_log_prob(v, x, y, c) - torch.tensor(moves)[:, None, None]
        new_v = (v + 1e-5 * shift).requires_grad_()
        ref = v + 0.1 * ref_shift
        advantage = torch.tensor([1.3, 0.8, 0.5]) * (1 if start % 2 else -1)

        result = policy_loss(
            new_v, x, y, old, advantage, c,
            clip_range=clip, granularity="image", reference_velocity=ref, kl_weight=beta, kl_scale="std_dev",
        )  # fmt: skip
        result.loss.backward()
        published = PublishedLoss.of(
            levels,
            indices,
            {"x": flat(x), "v": flat(new_v), "y": flat(y), "ref": flat(ref)},
            [values.mean().item() for values in old.double()],
            advantage.tolist(),
            clip,
            beta,
        )
        assert result.loss.item() == pytest.approx(published.loss, rel=1e-5, abs=1e-5)
        assert result.metrics["kl"].item() == pytest.approx(published.kl, rel=1e-5)
        assert new_v.grad is not None
        wanted = torch.tensor(published.gradient, dtype=torch.float64)
        got = new_v.grad.double().flatten(1)
        for row, expected in zip(got, wanted, strict=True):
            assert (row - expected).abs().max() <= 1e-5 * wanted.abs().max()
        if beta == 0:
            # One of the two moves out of the clip range is clipped, whatever the sign of the advantage.
            assert (wanted.abs().sum(1) == 0).sum() == 1


def test_kl_scales_differ_by_the_length_of_the_step() -> None:
    """s² = q²·(σ − σ'): dividing by q² instead makes a KL that is smaller by the factor σ − σ'."""
    c = transition_coefficients("flow_sde", 0.8, 0.55)
    v, x, y, ref = latents(SHAPE, 7, 4)
    old, advantage = torch.zeros(3, 4, 6), torch.zeros(3)
    kl = {
        scale: policy_loss(v, x, y, old, advantage, c, reference_velocity=ref, kl_scale=scale).metrics["kl"].item()
        for scale in ("variance", "std_dev")
    }
    assert kl["std_dev"] == pytest.approx(0.25 * kl["variance"], rel=1e-5)
