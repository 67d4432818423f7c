"""Arguments of `policy_loss` as a training step passes them: a rollout, and a velocity that moved a little since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import PolicyLoss, transition_coefficients, transition_log_prob, transition_step


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
    objective: str | None = None,
) -> dict[str, Any]:
    """Latents [batch, channels, grid·patch] in `dtype`; float32 for the rest, or float64 with a float64 `dtype`.

    `move` is how far the velocity is from the one that drew the sample: 0 is on policy. With an `objective` the case
    has that velocity too, and the mean divergence as its limit.
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
    moved = (velocity.double() + move * latent().double()).to(dtype)
    chosen: dict[str, Any] = {}
    if objective is not None:
        means = (moved - velocity).double() * coefficients.velocity_scale.double()[:, None, None, None]
        divergence = means.square() / (2 * coefficients.std.double()[:, None, None, None] ** 2)
        chosen = {"objective": objective, "old_velocity": velocity, "divergence_limit": divergence.mean().item()}
    return chosen | {
        "velocity": moved,
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


SPOILED_COEFFICIENTS = [
    *[(name, bad) for name in ("std", "noise_rate") for bad in (0.0, 1e-30, float("nan"))],
    *[(name, bad) for name in ("velocity_scale", "sample_drift") for bad in (float("nan"), float("inf"))],
]


def assert_a_spoiled_coefficient_leaves_out_its_sample(
    run: Callable[[dict[str, Any]], tuple[PolicyLoss, Tensor]], case: dict[str, Any], name: str, bad: float
) -> None:
    """`run` gives loss and gradient of `case`, which has coefficients of its own for each sample and no mask."""
    _, plain = run(case)
    coefficients = case["coefficients"]
    row = getattr(coefficients, name).clone()
    row[1] = bad
    result, gradient = run(case | {"coefficients": replace(coefficients, **{name: row})})
    assert result.metrics["non_finite"] == plain[1, 0].numel()
    assert result.loss.isfinite() and all(value.isfinite() for value in result.metrics.values())
    assert not gradient[1].any() and plain.flatten(1).any(1).all()
    plain[1] = 0.0
    assert torch.equal(gradient, plain)


def spoilable_case(granularity: str, with_reference: bool, name: str, **options: Any) -> dict[str, Any]:
    """A case for the check above; the noise rate only matters as the scale of the KL."""
    case = make_case(masked=False, **options) | {"granularity": granularity, "clip_range": 0.9}
    if not with_reference:
        return case | {"reference_velocity": None, "kl_weight": 0.0}
    return case | {"kl_scale": "std_dev" if name == "noise_rate" else "variance"}


def assert_an_overflowing_image_is_left_out(
    run: Callable[[dict[str, Any]], tuple[PolicyLoss, Tensor]], case: dict[str, Any]
) -> None:
    """`case` has no mask. The weights of sample 1 are finite, their sums with log-ratios and squares are not."""
    case = case | {"granularity": "image", "clip_range": 0.9, "advantage": case["advantage"].clamp(-0.5, 0.5)}
    _, plain = run(case)
    plain[1] = 0.0
    valid = torch.ones_like(case["old_log_prob"], dtype=torch.bool)
    valid[1] = False
    masked, _ = run(case | {"mask": valid})
    # Small enough that no position is left out for its own advantage times weight.
    advantage = case["advantage"].clone()
    advantage[1] = 1e-30
    # The second ones overflow only as squares.
    for weight in (3e38, 3e19):
        weights = case["weights"].clone()
        weights[1] = weight
        result, gradient = run(case | {"weights": weights, "advantage": advantage})
        assert result.metrics["non_finite"] == plain[1, 0].numel()
        assert torch.equal(gradient, plain) and gradient[0].any()
        for name in ("policy_loss", "kl", "ratio_mean", "ratio_min", "ratio_max", "approx_kl"):
            torch.testing.assert_close(result.metrics[name], masked.metrics[name])
        torch.testing.assert_close(result.loss, masked.loss)


def assert_a_weight_that_overflows_is_left_out(
    run: Callable[[dict[str, Any]], tuple[PolicyLoss, Tensor]], case: dict[str, Any]
) -> None:
    """`case` has no mask, and weights [B, h, w] for patches of 2 x 2."""
    advantage = torch.full_like(case["advantage"], -1.0)
    # The largest ratio in sample 1, which no upper bound clips for a negative advantage.
    old_log_prob = case["old_log_prob"].clone()
    old_log_prob[1] = -1e30
    case = case | {"advantage": advantage, "old_log_prob": old_log_prob}
    # An image's ratio is taken after its weights, so that a large one makes a large ratio and no large term.
    by_image = case.get("granularity") == "image"
    largest = 2.0**60 if by_image else 2.0**63
    for weight, left_out in ((1e34, 4), (2.0**64, 4), (largest, 0)):
        weights = case["weights"].clone()
        weights[1, 0, 0] = weight
        result, gradient = run(case | {"weights": weights})
        assert result.metrics["non_finite"] == left_out
        assert result.loss.isfinite() and all(value.isfinite() for value in result.metrics.values())
        assert gradient.isfinite().all() and gradient[0].any()
        assert result.loss.abs() > 1e20 if left_out == 0 and not by_image else result.loss.abs() < 1e10


def assert_the_log_ratio_of_an_image_is_clamped_by_position(
    run: Callable[[dict[str, Any]], tuple[PolicyLoss, Tensor]], case: dict[str, Any]
) -> None:
    """`case` has no mask. One position has an extreme log-ratio, which leaves the rest of its image a gradient."""
    case = case | {"granularity": "image", "clip_range": 0.99, "weights": None, "kl_weight": 0.0}
    case["old_log_prob"] = case["old_log_prob"].clone()
    case["old_log_prob"][0, 1, 2] -= 1e4
    result, gradient = run(case)
    # Sample 0 has the largest ratio: the others moved little.
    expected = 20 / case["old_log_prob"][0].numel()
    assert result.metrics["ratio_max"].log().item() == pytest.approx(expected, rel=0.3)
    touched = gradient[0].any(0)
    assert not touched[1, 2] and touched.sum() == touched.numel() - 1
