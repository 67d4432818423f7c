"""GRPO-Guard as Flow-Factory computes it and Flow-DPPO as UniRL does, number by number, against the library.

Both are image-level objectives of one step. The oracle uses nothing but Python floats. It was compared once with the
published functions themselves (docs/decisions.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from star_kernels import policy_loss, transition_coefficients, transition_step

SHAPE = (4, 2, 3, 4)
ADVANTAGES = [1.3, 0.8, -0.6, -1.1]
Numbers = list[float]


def log_prob(drawn: Numbers, means: Numbers, std: float) -> float:
    each = [
        -((y - m) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
        for y, m in zip(drawn, means, strict=True)
    ]
    return math.fsum(each) / len(each)


def mean_square(first: Numbers, second: Numbers) -> float:
    return math.fsum((a - b) ** 2 for a, b in zip(first, second, strict=True)) / len(first)


def published_guard(drawn: Numbers, new: Numbers, old: Numbers, std: float, advantage: float, clip: float) -> float:
    """The log-ratio times the step's standard deviation, plus what takes its bias out; then PPO's clip."""
    difference = log_prob(drawn, new, std) - log_prob(drawn, old, std)
    ratio = math.exp(difference * std + mean_square(new, old) / (2 * std))
    return max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip))


def published_dppo(drawn: Numbers, new: Numbers, old: Numbers, std: float, advantage: float, limit: float) -> float:
    """No clip: an image whose KL to the old policy has reached the limit is left out on its way out."""
    ratio = math.exp(log_prob(drawn, new, std) - log_prob(drawn, old, std))
    far = mean_square(new, old) / (2 * std**2) >= limit
    removed = far and ((ratio > 1 and advantage > 0) or (ratio < 1 and advantage < 0))
    return 0.0 if removed else -advantage * ratio


@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
@pytest.mark.parametrize(("objective", "published"), [("guard", published_guard), ("dppo", published_dppo)])
def test_image_level_loss_and_gradient_are_the_published_ones(
    objective: str, published: Callable[..., float], kind: str
) -> None:
    generator = torch.Generator().manual_seed(11)
    acted = 0
    for sigma in (0.9, 0.6, 0.3):
        c = transition_coefficients(kind, sigma, 0.8 * sigma)
        old, x, noise, shift = (torch.randn(SHAPE, generator=generator) for _ in range(4))
        step = transition_step(old, x, c, noise=noise)
        assert step.log_prob is not None
        # One image in two moves further than the other.
        velocity = (old + torch.tensor([0.02, 0.2, 0.02, 0.2])[:, None, None, None] * shift).requires_grad_()
        a, b, s = (row.double().item() for row in (c.sample_scale, c.velocity_scale, c.std))
        bound = {"guard": 0.02 * s, "dppo": 0.004 * (b / s) ** 2}[objective]
        options = {"clip_range": bound} if objective == "guard" else {"divergence_limit": bound}
        result = policy_loss(
            velocity, x, step.next_sample, step.log_prob, torch.tensor(ADVANTAGES), c,
            objective=objective, old_velocity=old, granularity="image", **options,
        )  # fmt: skip
        result.loss.backward()

        means, old_means = (a * x.double() + b * v.detach().double() for v in (velocity, old))
        rows = [list(map(Tensor.tolist, latent.double().flatten(1))) for latent in (step.next_sample, means, old_means)]

        def loss(new: list[Numbers], rows: list[list[Numbers]] = rows, s: float = s, bound: float = bound) -> float:
            each = zip(rows[0], new, rows[2], ADVANTAGES, strict=True)
            return math.fsum(published(drawn, mean, before, s, a, bound) for drawn, mean, before, a in each) / 4

        assert result.loss.item() == pytest.approx(loss(rows[1]), rel=1e-5, abs=1e-6)
        assert velocity.grad is not None
        # The gradient by central differences of the published number, at two entries of each image.
        for image in range(4):
            for entry in (0, 17):
                sides = []
                for sign in (1, -1):
                    moved = [list(row) for row in rows[1]]
                    moved[image][entry] += sign * b * 1e-5
                    sides.append(loss(moved))
                got = velocity.grad[image].flatten()[entry].item()
                assert got == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-7)
        acted += int(result.metrics["clip_fraction"].item() * 4)
    assert 0 < acted < 12
