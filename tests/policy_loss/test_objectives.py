"""Every objective against its formula, written out anew and differentiated by autograd (docs/method.md, section 5)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import policy_loss, transition_step
from star_kernels.policy_loss.reference import OBJECTIVES
from tests.policy_loss.cases import make_case


def by_formula(case: dict[str, Any]) -> dict[str, Tensor]:
    """Loss, policy term, KL, divergence and clip fraction as the method's page states them, in float64, with a mask."""
    c, mask = case["coefficients"], case["mask"].double()
    a, b, s = (row[:, None, None, None] for row in (c.sample_scale, c.velocity_scale, c.std))
    v_u, g = case["unconditional_velocity"], case["guidance_scale"]
    v = v_u + g * (case["velocity"] - v_u)
    mean, old_mean = a * case["sample"] + b * v, a * case["sample"] + b * case["old_velocity"]
    delta = mean - old_mean
    if case["objective"] == "guard":
        log_ratio = ((case["next_sample"] - old_mean) * delta / s).mean(1)
    else:
        squares = -((case["next_sample"] - mean) ** 2) / (2 * s**2) - s.log() - 0.5 * math.log(2 * math.pi)
        log_ratio = squares.mean(1) - case["old_log_prob"]
    divergence = (delta**2 / (2 * s**2)).mean(1)
    patch = case["velocity"].shape[-1] // case["weights"].shape[-1]
    w = case["weights"].repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    low, high = case["clip_range"]
    advantage, moved = case["advantage"], divergence

    def over_positions(values: Tensor) -> Tensor:
        return (mask * values).sum((1, 2)) / mask.sum((1, 2))

    clamped = log_ratio.clamp(-20, 20)
    if case["granularity"] == "image":
        spread = over_positions(w**2).sqrt()
        ratio, moved = over_positions(w * clamped).exp(), over_positions(divergence)
        low, high = low * spread, high * spread
    else:
        ratio, advantage = clamped.exp(), advantage[:, None, None]
    policy = -advantage * ratio
    if case["objective"] == "dppo":
        outside = (moved >= case["divergence_limit"]) & ((ratio - 1) * advantage > 0)
        policy = torch.where(outside, 0.0, policy)
    elif case["objective"] == "none":
        outside = torch.zeros_like(ratio, dtype=torch.bool)
    else:
        outside = (ratio < 1 - low) | (ratio > 1 + high)
        policy = torch.maximum(policy, -advantage * ratio.clamp(1 - low, 1 + high))
    by_image = case["granularity"] == "image"
    policy = policy.mean() if by_image else over_positions(w * policy).mean()
    kl = over_positions(((v - case["reference_velocity"]) ** 2).mean(1)).mean()
    return {
        "loss": policy + case["kl_weight"] * kl,
        "policy_loss": policy,
        "kl": kl,
        "divergence": over_positions(divergence).mean(),
        "clip_fraction": outside.double().mean() if by_image else (mask * outside).sum() / mask.sum(),
    }


@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_formula(objective: str, granularity: str) -> None:
    fractions = []
    for seed in range(6):
        case = make_case(seed=seed, batch=5, dtype=torch.float64, move=0.05, objective=objective)
        case |= {"granularity": granularity, "kl_scale": "velocity"}
        case |= {"unconditional_velocity": case["velocity"] + 0.02 * case["sample"], "guidance_scale": 1.5}
        if granularity == "image":
            case["clip_range"] = (2e-4, 5e-4)
        velocity = case["velocity"].clone().requires_grad_()
        wanted = by_formula(case | {"velocity": velocity})
        (wanted_gradient,) = torch.autograd.grad(wanted["loss"], velocity)
        result = policy_loss(**case | {"velocity": velocity})
        (gradient,) = torch.autograd.grad(result.loss, velocity)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-14)
        for name, value in wanted.items():
            got = result.loss if name == "loss" else result.metrics[name]
            torch.testing.assert_close(got, value.detach(), rtol=1e-9, atol=1e-14)
        fractions.append(result.metrics["clip_fraction"].item())
    assert any(fractions) == (objective != "none") and min(fractions) < 1


@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_policy_every_objective_has_the_gradient_of_clip_and_guard_that_times_s(
    objective: str, granularity: str
) -> None:
    case = make_case(move=0.0, objective=objective) | {"granularity": granularity, "kl_weight": 0.0}
    gradients = []
    for chosen in (objective, "clip"):
        velocity = case["velocity"].clone().requires_grad_()
        result = policy_loss(**case | {"velocity": velocity, "objective": chosen})
        assert result.metrics["ratio_min"] == result.metrics["ratio_max"] == 1
        assert result.metrics["divergence"] == 0 and result.metrics["clip_fraction"] == 0
        gradients.append(torch.autograd.grad(result.loss, velocity)[0])
    scale = case["coefficients"].std[:, None, None, None] if objective == "guard" else 1.0
    assert gradients[1].any()
    torch.testing.assert_close(gradients[0], scale * gradients[1], rtol=1e-5, atol=1e-9)


def test_the_ratio_of_guard_does_not_fall_with_the_distance_of_the_policies() -> None:
    """The log-ratio has the mean −‖Δ‖²/(2s²) over what was drawn; guard's has mean 0."""
    case = make_case(batch=200, channels=8, grid=(8, 8), patch=(1, 1), masked=False, dtype=torch.float64)
    noise = torch.randn(case["sample"].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    old_velocity = case["velocity"] + 0.3
    step = transition_step(old_velocity, case["sample"], case["coefficients"], noise=noise)
    case |= {"next_sample": step.next_sample, "old_log_prob": step.log_prob, "old_velocity": old_velocity}
    case |= {"granularity": "image", "weights": None, "reference_velocity": None, "kl_weight": 0.0}
    clip, guard = (policy_loss(**case, objective=objective).metrics for objective in ("clip", "guard"))
    assert clip["ratio_mean"].log().item() == pytest.approx(-clip["divergence"].item(), rel=0.2)
    assert abs(guard["ratio_mean"].log().item()) < 0.1 * clip["divergence"].item()


@pytest.mark.parametrize("granularity", ["position", "image"])
def test_what_has_moved_far_drops_out_of_dppo_only_on_its_way_out(granularity: str) -> None:
    case = make_case(move=0.05, objective="dppo", masked=False) | {"granularity": granularity, "kl_weight": 0.0}
    gradients = []
    for limit in (0.0, 1e9):
        velocity = case["velocity"].clone().requires_grad_()
        result = policy_loss(**case | {"velocity": velocity, "divergence_limit": limit})
        gradients.append(torch.autograd.grad(result.loss, velocity)[0].any(1))
    dropped = gradients[1] & ~gradients[0]
    # Nothing is dropped beyond reach. At a limit of 0 what is dropped is that whose ratio is on its advantage's side.
    assert gradients[1].all() and result.metrics["clip_fraction"] == 0
    plain = policy_loss(**case | {"objective": "clip", "clip_range": 0.0, "weights": None})
    assert dropped.any() and (plain.metrics["clip_fraction"] == 1 or granularity == "position")
    at_limit = policy_loss(**case | {"divergence_limit": 0.0}).metrics["clip_fraction"].item()
    share = dropped.flatten(1).any(1) if granularity == "image" else dropped
    assert at_limit == pytest.approx(share.double().mean().item())


def test_weights_do_not_hide_movement_from_the_divergence() -> None:
    """A map of zeros where the policy moves: its ratio stays 1, and the divergence is that without a map."""
    case = make_case(patch=(1, 1), grid=(6, 8), masked=False, objective="clip") | {"granularity": "image"}
    case["velocity"] = case["old_velocity"].clone()
    case["velocity"][:, :, :3] += 0.5
    case["weights"] = torch.zeros(3, 6, 8)
    case["weights"][:, 3:] = 2.0
    even, mapped = (policy_loss(**case | {"weights": weights}).metrics for weights in (None, case["weights"]))
    assert mapped["ratio_min"] == mapped["ratio_max"] == 1 != even["ratio_min"]
    assert mapped["divergence"] == even["divergence"] > 0


def test_the_divergence_is_reported_where_the_old_velocity_is_given() -> None:
    case = make_case(objective="none")
    assert "divergence" in policy_loss(**case).metrics
    assert "divergence" not in policy_loss(**case | {"old_velocity": None}).metrics
