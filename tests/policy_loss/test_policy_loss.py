"""What the objective is, and the properties that every implementation of it must keep (docs/method.md, 5 and 6)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from star_kernels import PolicyLoss, policy_loss, transition_coefficients, transition_log_prob
from tests.policy_loss.cases import (
    SPOILED_COEFFICIENTS,
    assert_a_spoiled_coefficient_leaves_out_its_sample,
    assert_a_weight_that_overflows_is_left_out,
    assert_an_overflowing_image_is_left_out,
    assert_the_log_ratio_of_an_image_is_clamped_by_position,
    make_case,
    spoilable_case,
)

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)
METRICS = ["policy_loss", "kl", "clip_fraction", "ratio_mean", "ratio_min", "ratio_max", "approx_kl", "non_finite"]
granularities = st.sampled_from(["position", "image"])
cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 999),
        "batch": st.integers(1, 4),
        "channels": st.integers(1, 9),
        "grid": st.tuples(st.integers(1, 5), st.integers(1, 5)),
        "patch": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "masked": st.booleans(),
    }
)


def run(case: dict[str, Any], **changes: Any) -> tuple[PolicyLoss, Tensor]:
    """The loss with its gradient."""
    velocity = changes.pop("velocity", case["velocity"]).clone().requires_grad_()
    result = policy_loss(**{**case, **changes, "velocity": velocity})
    assert not any(metric.requires_grad for metric in result.metrics.values())
    (gradient,) = torch.autograd.grad(result.loss, velocity)
    return result, gradient


def by_hand(case: dict[str, Any], kl_by_rate: bool) -> dict[str, float]:
    """Position-level loss and metrics with Python floats, one position at a time."""
    v, x, y, ref = (case[n].double().tolist() for n in ("velocity", "sample", "next_sample", "reference_velocity"))
    old, advantages = case["old_log_prob"].tolist(), case["advantage"].tolist()
    c = case["coefficients"]
    low, high = case["clip_range"]
    batch, channels, height, width = case["velocity"].shape
    rows, columns = case["weights"].shape[1:]
    policy = kl = 0.0
    ratios: list[float] = []
    for b in range(batch):
        a, bb, s, q = (t[b].item() for t in (c.sample_scale, c.velocity_scale, c.std, c.noise_rate))
        sums = [0.0, 0.0, 0.0]
        for i in range(height):
            for j in range(width):
                if case["mask"] is not None and not case["mask"][b, i, j]:
                    continue
                log_prob = distance = 0.0
                for channel in range(channels):
                    mean = a * x[b][channel][i][j] + bb * v[b][channel][i][j]
                    anchor = a * x[b][channel][i][j] + bb * ref[b][channel][i][j]
                    z = (y[b][channel][i][j] - mean) / s
                    log_prob += (-z * z / 2 - math.log(s) - math.log(2 * math.pi) / 2) / channels
                    distance += (mean - anchor) ** 2 / channels
                ratio = math.exp(log_prob - old[b][i][j])
                inside = min(max(ratio, 1 - low), 1 + high)
                weight = case["weights"][b, i * rows // height, j * columns // width].item()
                sums[0] += weight * max(-advantages[b] * ratio, -advantages[b] * inside)
                sums[1] += distance / (2 * (q if kl_by_rate else s) ** 2)
                sums[2] += 1
                ratios.append(ratio)
        policy += sums[0] / sums[2] / batch
        kl += sums[1] / sums[2] / batch
    return {
        "loss": policy + case["kl_weight"] * kl,
        "policy_loss": policy,
        "kl": kl,
        "clip_fraction": sum(not 1 - low <= ratio <= 1 + high for ratio in ratios) / len(ratios),
        "ratio_mean": sum(ratios) / len(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "approx_kl": sum(math.log(ratio) ** 2 for ratio in ratios) / len(ratios) / 2,
        "non_finite": 0.0,
    }


@SETTINGS
@given(cases, st.sampled_from(["variance", "std_dev"]))
def test_position_level_loss_and_metrics_are_the_sums_of_the_definition(options: Any, kl_scale: str) -> None:
    case = make_case(**options, dtype=torch.float64)
    result = policy_loss(**case, kl_scale=kl_scale)
    assert list(result.metrics) == METRICS
    for name, expected in by_hand(case, kl_scale == "std_dev").items():
        got = result.loss if name == "loss" else result.metrics[name]
        assert got.dtype == torch.float64 and got.shape == () and (name == "loss" or not got.requires_grad)
        assert got.item() == pytest.approx(expected, rel=1e-9, abs=1e-12), name


@SETTINGS
@given(cases)
def test_image_level_ratio_is_that_of_the_weighted_mean_log_prob_over_valid_positions(options: Any) -> None:
    """And its clip range is scaled by the root of the mean squared weight."""
    case = make_case(**options, dtype=torch.float64)
    result, _ = run(case, granularity="image", clip_range=1e-3)
    log_prob = transition_log_prob(case["velocity"], case["sample"], case["next_sample"], case["coefficients"])
    mask = torch.ones_like(log_prob) if case["mask"] is None else case["mask"].double()
    weights = case["weights"]
    upsampled = torch.nn.functional.interpolate(weights[:, None], size=log_prob.shape[1:], mode="nearest")[:, 0]
    per_image = []
    for m, w, new, old in zip(mask, upsampled, log_prob, case["old_log_prob"], strict=True):
        per_image.append(((m * w * (new - old)).sum() / m.sum(), ((m * w**2).sum() / m.sum()).sqrt()))
    ratio = torch.stack([log_ratio for log_ratio, _ in per_image]).exp()
    clip = 1e-3 * torch.stack([spread for _, spread in per_image])
    a = case["advantage"]
    expected = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)).mean()
    torch.testing.assert_close(result.metrics["policy_loss"], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.metrics["ratio_max"], ratio.max(), rtol=1e-9, atol=1e-12)
    expected_share = ((ratio - 1).abs() > clip).double().mean()
    torch.testing.assert_close(result.metrics["clip_fraction"], expected_share, rtol=1e-9, atol=1e-12)


def test_the_clip_fraction_of_a_weighted_ratio_is_that_of_an_even_one() -> None:
    """Random moves of the velocity, and maps of a root mean square far above 1, drawn anew for each image."""
    case = make_case(batch=600, channels=4, grid=(8, 8), patch=(1, 1), masked=False, dtype=torch.float64)
    weights = torch.exp(1.5 * torch.randn(600, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    weights /= weights.mean((1, 2), keepdim=True)
    spread = weights.square().mean((1, 2)).sqrt()
    assert spread.median() > 1.7
    case |= {"granularity": "image", "clip_range": 3e-4, "kl_weight": 0.0, "reference_velocity": None}

    def clip_fraction(**changes: Any) -> float:
        return policy_loss(**{**case, **changes}).metrics["clip_fraction"].item()

    even, weighted = clip_fraction(weights=None), clip_fraction(weights=weights)
    # What the range as given would clip.
    log_prob = transition_log_prob(case["velocity"], case["sample"], case["next_sample"], case["coefficients"])
    ratio = (weights * (log_prob - case["old_log_prob"])).mean((1, 2)).exp()
    unscaled = ((ratio - 1).abs() > 3e-4).double().mean().item()
    assert 0.1 < even < 0.6
    assert abs(weighted - even) < 0.06 < 0.15 < unscaled - even


@SETTINGS
@given(cases)
def test_on_policy_position_and_image_gradients_are_equal_under_any_map(options: Any) -> None:
    case = make_case(**options, move=0.0)
    (_, position), (_, image) = (run(case, granularity=granularity) for granularity in ("position", "image"))
    torch.testing.assert_close(image, position, rtol=1e-5, atol=1e-9)


@SETTINGS
@given(cases, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_on_policy_without_weights_position_and_image_gradients_are_equal(options: Any, dtype: torch.dtype) -> None:
    """And equal to the gradient of −A times the image's log-prob, which is Flow-GRPO's on policy."""
    case = make_case(**options, dtype=dtype, move=0.0) | {"weights": None, "kl_weight": 0.0}
    velocity = case["velocity"].clone().requires_grad_()
    log_prob = transition_log_prob(velocity, case["sample"], case["next_sample"], case["coefficients"])
    mask = torch.ones_like(log_prob) if case["mask"] is None else case["mask"].to(log_prob.dtype)
    image_log_prob = (mask * log_prob).sum((1, 2)) / mask.sum((1, 2))
    (expected,) = torch.autograd.grad((-case["advantage"] * image_log_prob).mean(), velocity)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for granularity in ("position", "image"):
        result, gradient = run(case, granularity=granularity)
        assert result.metrics["ratio_min"] == result.metrics["ratio_max"] == 1
        assert result.metrics["clip_fraction"] == 0 and result.metrics["approx_kl"] == 0
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=1e-9)
        torch.testing.assert_close(result.loss, -case["advantage"].mean(), rtol=1e-5, atol=1e-7)


@SETTINGS
@given(cases, granularities)
def test_weights_of_one_are_no_weights_exactly(options: Any, granularity: str) -> None:
    case = make_case(**options)
    ones, gradient_ones = run(case, weights=torch.ones_like(case["weights"]), granularity=granularity)
    none, gradient_none = run(case, weights=None, granularity=granularity)
    assert torch.equal(ones.loss, none.loss) and torch.equal(gradient_ones, gradient_none)


@SETTINGS
@given(cases, granularities)
def test_a_position_reads_the_weight_of_its_token(options: Any, granularity: str) -> None:
    case = make_case(**options)
    patch = options["patch"]
    fine = case["weights"].repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
    coarse_result, fine_result = run(case, granularity=granularity), run(case, weights=fine, granularity=granularity)
    assert torch.equal(coarse_result[0].loss, fine_result[0].loss) and torch.equal(coarse_result[1], fine_result[1])


@SETTINGS
@given(cases)
def test_weights_scale_the_policy_gradient_of_their_position_only(options: Any) -> None:
    case = make_case(**options) | {"kl_weight": 0.0}
    _, plain = run(case, weights=None)
    _, weighted = run(case)
    patch = options["patch"]
    weights = case["weights"].repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
    torch.testing.assert_close(weighted, plain * weights[:, None], rtol=1e-5, atol=1e-9)


@SETTINGS
@given(cases, granularities)
def test_an_advantage_of_zero_gives_no_policy_gradient(options: Any, granularity: str) -> None:
    case = make_case(**options) | {"kl_weight": 0.0, "granularity": granularity}
    case["advantage"][0] = 0
    result, gradient = run(case)
    assert not gradient[0].any()
    everywhere, gradient = run(case, advantage=torch.zeros_like(case["advantage"]))
    assert not gradient.any() and everywhere.loss == 0
    assert result.metrics["non_finite"] == 0


@SETTINGS
@given(cases, granularities, st.sampled_from([torch.bool, torch.float32]))
def test_a_masked_position_gets_no_gradient_and_is_not_looked_at(
    options: Any, granularity: str, mask_dtype: torch.dtype
) -> None:
    case = make_case(**{**options, "masked": True}) | {"granularity": granularity}
    mask = case["mask"]
    result, gradient = run(case, mask=mask.to(mask_dtype))
    assert not gradient[~mask[:, None].expand(gradient.shape)].any()
    assert bool(gradient[mask[:, None].expand(gradient.shape)].any())
    spoiled = dict(case)
    for name in ("velocity", "sample", "next_sample", "reference_velocity"):
        spoiled[name] = case[name].masked_fill(~mask[:, None], float("nan"))
    spoiled["old_log_prob"] = case["old_log_prob"].masked_fill(~mask, float("inf"))
    same, same_gradient = run(spoiled)
    assert torch.equal(result.loss, same.loss) and torch.equal(gradient, same_gradient)
    assert all(torch.equal(result.metrics[name], same.metrics[name]) for name in METRICS)


@pytest.mark.parametrize("granularity", ["position", "image"])
def test_a_sample_without_valid_positions_adds_zero(granularity: str) -> None:
    case = make_case(batch=2) | {"granularity": granularity}
    case["mask"][1] = False
    result, gradient = run(case)
    alone, alone_gradient = run(
        {**case, **{name: value[:1] for name, value in case.items() if isinstance(value, Tensor)}},
        coefficients=case["coefficients"][:1],
    )
    assert torch.equal(2 * result.loss, alone.loss) and torch.equal(2 * gradient[:1], alone_gradient)
    assert not gradient[1].any()
    assert torch.equal(result.metrics["ratio_mean"], alone.metrics["ratio_mean"])
    case["mask"][0] = False
    nothing, gradient = run(case)
    assert nothing.loss == 0 and not gradient.any()
    assert {name: value.item() for name, value in nothing.metrics.items()} == {
        **dict.fromkeys(METRICS, 0.0),
        **dict.fromkeys(["ratio_mean", "ratio_min", "ratio_max"], 1.0),
    }


@SETTINGS
@given(cases, granularities, st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_samples_gradient_does_not_depend_on_its_batch(options: Any, granularity: str, dtype: torch.dtype) -> None:
    # Four samples against one: the factor 1/B is then exact, and everything else has to be the same bits.
    case = make_case(**{**options, "batch": 4}, dtype=dtype) | {"granularity": granularity}
    _, together = run(case)
    for index in range(4):
        one = slice(index, index + 1)
        alone = {name: value[one] if isinstance(value, Tensor) else value for name, value in case.items()}
        alone["coefficients"] = case["coefficients"][one]
        assert torch.equal(run(alone)[1], 4 * together[one])


def test_a_large_samples_gradient_does_not_depend_on_its_batch_with_two_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # Log-ratios of about one, so that the last bits of their sums show in the ratio.
        case = make_case(batch=2, channels=3, grid=(100, 90), patch=(2, 2), move=3.0)
        case |= {"granularity": "image", "clip_range": 0.99, "advantage": torch.tensor([-1.0, -1.0])}
        _, together = run(case)
        alone = {name: value[1:] if isinstance(value, Tensor) else value for name, value in case.items()}
        _, single = run(alone, coefficients=case["coefficients"][1:])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(single, 2 * together[1:])


@SETTINGS
@given(cases, granularities, st.sampled_from([-1.0, 1.0]), st.sampled_from([30.0, 1e4, 1e30]))
def test_an_extreme_log_ratio_overflows_nothing(options: Any, granularity: str, sign: float, size: float) -> None:
    case = make_case(**options) | {"granularity": granularity, "kl_weight": 0.0, "weights": None}
    case["old_log_prob"] = case["old_log_prob"] - sign * size
    result, gradient = run(case)
    assert result.loss.isfinite() and all(value.isfinite() for value in result.metrics.values())
    assert not gradient.any()
    assert result.metrics["ratio_max"].item() == pytest.approx(math.exp(20 * sign), rel=1e-5)
    assert result.metrics["non_finite"] == 0


@SETTINGS
@given(
    cases,
    granularities,
    st.sampled_from(
        ["velocity", "sample", "next_sample", "reference_velocity", "unconditional_velocity", "old_log_prob"]
    ),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_a_non_finite_position_is_counted_and_adds_nothing(
    options: Any, granularity: str, name: str, bad: float
) -> None:
    case = make_case(**{**options, "masked": False}) | {"granularity": granularity}
    case["unconditional_velocity"], case["guidance_scale"] = case["velocity"] + 0.01, 1.5
    spoiled = dict(case)
    spoiled[name] = case[name].clone()
    spoiled[name][0, ..., 0, 0] = bad
    result, gradient = run(spoiled)
    assert result.metrics["non_finite"] == 1
    assert result.loss.isfinite() and gradient.isfinite().all() and not gradient[0, :, 0, 0].any()
    _, plain = run(case)
    if granularity == "position":
        gradient[0, :, 0, 0] = plain[0, :, 0, 0]
        assert torch.equal(gradient, plain)
    else:
        assert torch.equal(gradient[1:], plain[1:])


@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize(("name", "bad"), SPOILED_COEFFICIENTS)
def test_a_spoiled_coefficient_leaves_out_its_sample(
    granularity: str, with_reference: bool, name: str, bad: float
) -> None:
    if name == "noise_rate" and not with_reference:
        pytest.skip("only the KL reads it")
    case = spoilable_case(granularity, with_reference, name) | {"backend": "reference"}
    assert_a_spoiled_coefficient_leaves_out_its_sample(run, case, name, bad)


def test_an_overflowing_image_is_left_out() -> None:
    assert_an_overflowing_image_is_left_out(run, make_case(masked=False) | {"backend": "reference"})


def test_the_log_ratio_of_an_image_is_clamped_by_position() -> None:
    case = make_case(masked=False) | {"backend": "reference"}
    assert_the_log_ratio_of_an_image_is_clamped_by_position(run, case)


@pytest.mark.parametrize("granularity", ["position", "image"])
def test_a_weight_that_overflows_is_left_out(granularity: str) -> None:
    assert_a_weight_that_overflows_is_left_out(
        run, make_case(masked=False) | {"granularity": granularity, "backend": "reference"}
    )


@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("name", ["advantage", "weights"])
def test_a_non_finite_advantage_or_weight_leaves_out_the_positions_it_covers(name: str, granularity: str) -> None:
    case = make_case(masked=False) | {"granularity": granularity}
    case[name] = case[name].clone()
    case[name][(0,) * case[name].dim()] = float("nan")
    result, gradient = run(case)
    height, width = case["velocity"].shape[2:]
    assert result.metrics["non_finite"] == (height * width if name == "advantage" else 2 * 2)
    assert result.loss.isfinite() and gradient.isfinite().all()
    assert not gradient[0, :, :2, :2].any() and gradient[1:].any()


@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_agrees_with_float64(granularity: str, dtype: torch.dtype, tolerance: float) -> None:
    for seed in range(5):
        case = make_case(seed=seed, channels=16, grid=(5, 7), dtype=dtype, move=0.05) | {"granularity": granularity}
        case["clip_range"] = 0.4
        exact = {n: v.double() if isinstance(v, Tensor) and n != "mask" else v for n, v in case.items()}
        exact["coefficients"] = case["coefficients"]._map(torch.Tensor.double)
        (result, gradient), (wanted, wanted_gradient) = run(case), run(exact)
        assert wanted.loss.dtype == torch.float64 and result.loss.dtype == torch.float32 and gradient.dtype == dtype
        assert result.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5, abs=1e-5)
        for name in METRICS:
            assert result.metrics[name].item() == pytest.approx(wanted.metrics[name].item(), rel=1e-4, abs=1e-6)
        assert (gradient.double() - wanted_gradient).norm() <= tolerance * wanted_gradient.norm()


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x,
        lambda x: torch.stack((x, x), -1)[..., 0],
    ],
)
@pytest.mark.parametrize("granularity", ["position", "image"])
def test_memory_layout_does_not_change_a_bit(layout: Any, granularity: str) -> None:
    case = make_case(channels=16) | {"granularity": granularity}
    other = {name: layout(value) if isinstance(value, Tensor) else value for name, value in case.items()}
    (plain, gradient), (same, same_gradient) = run(case), run(other, velocity=other["velocity"].detach())
    assert torch.equal(plain.loss, same.loss) and torch.equal(gradient, same_gradient)


@pytest.mark.parametrize("granularity", ["position", "image"])
def test_guidance_is_the_loss_of_the_guided_velocity(granularity: str) -> None:
    case = make_case(dtype=torch.float64) | {"granularity": granularity}
    unconditional = case["velocity"] - 0.01
    guided, gradient = run(case, unconditional_velocity=unconditional, guidance_scale=2.5)
    by_hand, gradient_by_hand = run(case, velocity=unconditional + 2.5 * (case["velocity"] - unconditional))
    torch.testing.assert_close(guided.loss, by_hand.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, 2.5 * gradient_by_hand, rtol=1e-9, atol=1e-12)


def test_the_kl_is_reported_without_being_weighed() -> None:
    case = make_case()
    weighed, free = policy_loss(**case), policy_loss(**(case | {"kl_weight": 0.0}))
    assert free.metrics["kl"] > 0 and torch.equal(free.metrics["kl"], weighed.metrics["kl"])
    assert torch.equal(free.loss, free.metrics["policy_loss"])
    torch.testing.assert_close(weighed.loss, weighed.metrics["policy_loss"] + 0.05 * weighed.metrics["kl"])
    without = policy_loss(**(case | {"kl_weight": 0.0, "reference_velocity": None}))
    assert without.metrics["kl"] == 0 and torch.equal(without.loss, free.loss)


def test_the_reference_policy_has_no_kl() -> None:
    case = make_case()
    assert policy_loss(**(case | {"reference_velocity": case["velocity"]})).metrics["kl"] == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_only_the_bound_on_the_side_that_the_advantage_pulls_to_clips(sign: float) -> None:
    case = make_case(move=1.0) | {"kl_weight": 0.0}
    case["advantage"] = torch.full_like(case["advantage"], sign)
    log_prob = transition_log_prob(case["velocity"], case["sample"], case["next_sample"], case["coefficients"])
    ratio = (log_prob - case["old_log_prob"]).exp()
    _, gradient = run(case, clip_range=(0.1, 0.2), mask=None)
    flat = ~gradient.any(1)
    assert torch.equal(flat, ratio > 1.2 if sign > 0 else ratio < 0.9)
    assert flat.any() and not flat.all()


@pytest.mark.parametrize("clip", [1e-3, 0, [1e-3, 1e-3]])
def test_one_clip_number_serves_both_sides(clip: Any) -> None:
    case = make_case()
    both = clip if isinstance(clip, list) else (clip, clip)
    assert torch.equal(
        policy_loss(**(case | {"clip_range": clip})).loss, policy_loss(**(case | {"clip_range": tuple(both)})).loss
    )


@pytest.mark.parametrize("kind", ["cps", "dance_sde", "ddim"])
def test_every_kind_with_noise_can_be_trained_on(kind: str) -> None:
    case = make_case(batch=2, move=0.0)
    levels = ([0.4, 0.5], [0.7, 0.6]) if kind == "ddim" else ([0.7, 0.6], [0.4, 0.5])
    c = transition_coefficients(kind, *(torch.tensor(level) for level in levels))
    old = transition_log_prob(case["velocity"], case["sample"], case["next_sample"], c)
    result, gradient = run(case, coefficients=c, old_log_prob=old)
    assert result.metrics["ratio_max"] == 1 and result.loss.isfinite() and gradient.any()
