"""The weights of the denoising steps and what they make of the gradient (docs/method.md, section 4)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels as sk

LEVELS = {
    "flow_sde": [1.0, 0.9, 0.7, 0.45, 0.2],
    "dance_sde": [1.0, 0.9, 0.7, 0.45, 0.2],
    "cps": [1.0, 0.9, 0.7, 0.45, 0.2],
    "ddim": [0.1, 0.3, 0.5, 0.8, 0.95],
}


def steps_of(kind: str, **options: Any) -> list[sk.TransitionCoefficients]:
    """In float64, so that a loss under them is in float64 too."""
    levels = torch.tensor(LEVELS[kind], dtype=torch.float64)
    if kind == "flow_sde":
        options["sigma_max"] = levels[1]
    return [sk.transition_coefficients(kind, now, after, **options) for now, after in pairwise(levels)]


@pytest.mark.parametrize("kind", LEVELS)
def test_weights_have_mean_1_and_are_in_proportion_to_their_kind(kind: str) -> None:
    steps = steps_of(kind)
    std = torch.cat([step.std for step in steps])
    b = torch.cat([step.velocity_scale for step in steps])
    for name, proportion in {"none": torch.ones(4), "std": std, "velocity": (std / b) ** 2}.items():
        weights = sk.temporal_weights(steps, kind=name)
        assert weights.dtype == torch.float32 and weights.shape == (4,)
        assert weights.mean().item() == pytest.approx(1, abs=1e-6)
        expected = (proportion / proportion.mean()).float()
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)
    assert torch.equal(sk.temporal_weights(steps), torch.ones(4))
    assert sk.temporal_weights(steps[1:3], kind="velocity").mean().item() == pytest.approx(1, abs=1e-6)


def test_steps_may_be_rows_and_rows_may_be_samples() -> None:
    levels = torch.tensor([0.9, 0.7, 0.45, 0.2])
    rows = sk.transition_coefficients("dance_sde", levels[:-1], levels[1:])
    steps = [sk.transition_coefficients("dance_sde", now.expand(5), after.expand(5)) for now, after in pairwise(levels)]
    for kind in ("none", "std", "velocity"):
        assert torch.equal(sk.temporal_weights(rows, kind=kind), sk.temporal_weights(steps, kind=kind))


@pytest.mark.parametrize("kind", LEVELS)
def test_velocity_weights_leave_the_noise_times_s_over_b_in_the_gradient(kind: str) -> None:
    """∂(τ·policy)/∂v = −A·w·ε·(s/b), up to a factor that all steps have in common."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    steps = steps_of(kind)
    advantage, weights = normal(2), normal(2, 3, 4).exp()
    factors = []
    for step, tau in zip(steps, sk.temporal_weights(steps, kind="velocity"), strict=True):
        velocity, sample, noise = (normal(2, 3, 6, 8) for _ in range(3))
        drawn = sk.transition_step(velocity, sample, step, noise=noise)
        velocity.requires_grad_()
        result = sk.policy_loss(velocity, sample, drawn.next_sample, drawn.log_prob, advantage, step, weights=weights)
        (gradient,) = torch.autograd.grad(tau.double() * result.loss, velocity)
        w = weights.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
        shape = -advantage[:, None, None, None] * w * noise * (step.std / step.velocity_scale)
        factor = (gradient * shape).sum() / shape.square().sum()
        torch.testing.assert_close(gradient, factor * shape, rtol=1e-6, atol=1e-12)
        factors.append(factor)
    torch.testing.assert_close(torch.stack(factors), factors[0].expand(4), rtol=1e-6, atol=0)


ODE = sk.transition_coefficients("ode", 0.5, 0.3)
TWO_LEVELS = sk.transition_coefficients("dance_sde", torch.tensor([0.9, 0.5]), torch.tensor([0.7, 0.3]))


@pytest.mark.parametrize(
    ("error", "name", "coefficients", "kind"),
    [
        (ValueError, "kind", TWO_LEVELS, "sigma"),
        (ValueError, r"coefficients\[1\]", [TWO_LEVELS[:1], ODE], "none"),
        (ValueError, "coefficients", ODE, "velocity"),
        (ValueError, r"coefficients\[0\]", [TWO_LEVELS], "std"),
        (ValueError, "coefficients", [], "none"),
        (TypeError, "coefficients", 0.5, "none"),
        (TypeError, r"coefficients\[0\]", [0.5], "none"),
    ],
)
def test_bad_input_names_the_argument(error: type[Exception], name: str, coefficients: Any, kind: str) -> None:
    with pytest.raises(error, match=rf"^{name}: expected .*got "):
        sk.temporal_weights(coefficients, kind=kind)
