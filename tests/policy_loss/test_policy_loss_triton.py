"""The Triton kernels of the loss, interpreted where there is no GPU, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import PolicyLoss, policy_loss, transition_coefficients, transition_log_prob, transition_step
from star_kernels.policy_loss import reference
from tests.policy_loss.cases import (
    SPOILED_COEFFICIENTS,
    assert_a_spoiled_coefficient_leaves_out_its_sample,
    assert_a_weight_that_overflows_is_left_out,
    assert_an_overflowing_image_is_left_out,
    assert_the_log_ratio_of_an_image_is_clamped_by_position,
    make_case,
    spoilable_case,
)

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
LATENTS = ("velocity", "sample", "next_sample", "reference_velocity", "unconditional_velocity", "old_velocity")
Case = dict[str, Any]


def case_of(**options: Any) -> Case:
    case = make_case(**{"batch": 2, "move": 0.05} | options)
    case["unconditional_velocity"], case["guidance_scale"] = 0.9 * case["velocity"], 1.5
    case["clip_range"] = (0.02, 0.05)
    case["coefficients"] = case["coefficients"].to(DEVICE)
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in case.items()}


def without(case: Case, *names: str) -> Case:
    case = case | dict.fromkeys(names)
    if "unconditional_velocity" in names:
        case["guidance_scale"] = 1.0
    if "reference_velocity" in names:
        case["kl_weight"] = 0.0
    return case


def in_float64(case: Case) -> Case:
    case = {name: value.double() if isinstance(value, Tensor) else value for name, value in case.items()}
    return case | {"coefficients": case["coefficients"]._map(torch.Tensor.double)}


def run(case: Case, backend: str = "triton", scale: float = 1.0) -> tuple[PolicyLoss, Tensor]:
    """The loss, and the gradient of `scale` times it."""
    velocity = case["velocity"].clone(memory_format=torch.preserve_format).requires_grad_()
    result = policy_loss(**case | {"velocity": velocity}, backend=backend)
    (gradient,) = torch.autograd.grad(scale * result.loss, velocity)
    return result, gradient


def assert_agrees(case: Case, scale: float = 1.0) -> None:
    (result, gradient), (wanted, wanted_gradient) = run(case, scale=scale), run(in_float64(case), "reference", scale)
    exact = result.loss.dtype == F64
    tolerance = {F64: 1e-12, F32: 1e-5, BF16: 1e-2, F16: 1e-2}[gradient.dtype]
    assert gradient.dtype == case["velocity"].dtype and gradient.shape == case["velocity"].shape
    assert (gradient.double() - wanted_gradient).norm() <= tolerance * wanted_gradient.norm()
    for name, value in (("loss", wanted.loss), *wanted.metrics.items()):
        got = result.loss if name == "loss" else result.metrics[name]
        assert got.dtype == (F64 if exact else F32) and got.shape == ()
        assert got.item() == pytest.approx(value.item(), rel=1e-12 if exact else 1e-5, abs=1e-12 if exact else 1e-6), (
            name
        )


def assert_same(first: tuple[PolicyLoss, Tensor], second: tuple[PolicyLoss, Tensor]) -> None:
    assert torch.equal(first[0].loss, second[0].loss) and torch.equal(first[1], second[1])
    assert all(torch.equal(value, second[0].metrics[name]) for name, value in first[0].metrics.items())


@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize(
    ("dtype", "channels", "grid", "patch", "left_out", "objective"),
    [
        (F32, 16, (5, 4), (2, 2), (), None),
        (F32, 16, (5, 4), (2, 2), (), "guard"),
        (F32, 16, (5, 4), (2, 2), ("reference_velocity",), "dppo"),
        (F32, 1, (1, 1), (1, 1), ("weights", "mask"), None),
        (BF16, 4, (3, 5), (1, 1), ("reference_velocity",), "none"),
        (F16, 5, (1, 4), (3, 1), ("unconditional_velocity", "mask"), "dppo"),
        (BF16, 32, (2, 3), (2, 1), ("weights", "unconditional_velocity"), "guard"),
        (F64, 3, (3, 2), (1, 2), (), "clip"),
    ],
)
def test_agrees_with_the_reference_in_float64(
    granularity: str,
    dtype: torch.dtype,
    channels: int,
    grid: tuple[int, int],
    patch: tuple[int, int],
    left_out: tuple[str, ...],
    objective: str | None,
) -> None:
    case = case_of(dtype=dtype, channels=channels, grid=grid, patch=patch, objective=objective)
    assert_agrees(without(case | {"granularity": granularity}, *left_out))


@pytest.mark.parametrize("granularity", ["position", "image"])
def test_a_single_ratio_is_its_own_mean(granularity: str) -> None:
    case = case_of(batch=1, grid=(1, 1), patch=(1, 1)) | {"granularity": granularity, "mask": None}
    assert_agrees(case)
    metrics = run(case)[0].metrics
    assert metrics["ratio_mean"] == metrics["ratio_min"] == metrics["ratio_max"] != 1


@pytest.mark.parametrize("kl_scale", ["variance", "std_dev", "velocity"])
def test_mixed_dtypes_and_all_scales_of_the_kl(kl_scale: str) -> None:
    case = case_of(channels=4, objective="clip") | {"kl_scale": kl_scale, "kl_weight": 3.0}
    dtypes = dict(zip(LATENTS, (BF16, F32, F64, F16, BF16, F16), strict=True))
    case |= {name: case[name].to(dtype) for name, dtype in dtypes.items()}
    assert_agrees(case | {"weights": case["weights"].half(), "advantage": case["advantage"].bfloat16()}, scale=-0.7)


@pytest.mark.parametrize(("granularity", "dtype"), [("position", BF16), ("image", F32)])
def test_an_unchanged_policy_has_a_ratio_of_exactly_one(granularity: str, dtype: torch.dtype) -> None:
    case = case_of(channels=16, grid=(5, 4), dtype=dtype, masked=False) | {"granularity": granularity}
    latents, guidance = [case["velocity"], case["sample"], case["coefficients"]], {"guidance_scale": 1.5}
    noise, base = case["next_sample"], case["unconditional_velocity"]
    step = transition_step(*latents, noise=noise, unconditional_velocity=base, **guidance, backend="triton")
    case |= {"next_sample": step.next_sample, "old_log_prob": step.log_prob}
    # In another layout, since the update may see another one than the rollout.
    case["velocity"] = case["velocity"].to(memory_format=torch.channels_last)
    result, gradient = run(case)
    assert result.metrics["ratio_min"] == result.metrics["ratio_max"] == result.metrics["ratio_mean"] == 1
    assert result.metrics["approx_kl"] == 0 and result.metrics["clip_fraction"] == 0
    assert gradient.any()


@pytest.mark.parametrize(
    ("layout", "granularity"),
    [
        (lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x, "position"),
        (lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x, "position"),
        (lambda x: torch.stack((x, x), -1)[..., 0], "image"),
    ],
    ids=["channels_last", "transposed", "strided"],
)
def test_memory_layout_does_not_change_a_bit(layout: Any, granularity: str) -> None:
    case = case_of(channels=16, grid=(3, 3), dtype=BF16) | {"granularity": granularity}
    other = {name: layout(value) if isinstance(value, Tensor) else value for name, value in case.items()}
    assert_same(run(case), run(other))


@pytest.mark.parametrize(("granularity", "objective"), [("position", None), ("image", "guard"), ("image", "dppo")])
def test_a_samples_gradient_does_not_depend_on_its_batch(granularity: str, objective: str | None) -> None:
    # Two samples against one: the factor 1/B is then exact, and everything else has to be the same bits.
    case = case_of(channels=16, grid=(5, 4), dtype=BF16, objective=objective) | {"granularity": granularity}
    _, together = run(case)
    one = slice(1, 2)
    alone = {name: value[one] if isinstance(value, Tensor) else value for name, value in case.items()}
    _, gradient = run(alone | {"coefficients": case["coefficients"][one]})
    assert gradient.any() and torch.equal(gradient, 2 * together[one])


@pytest.mark.parametrize("granularity", ["position", "image"])
def test_what_is_not_finite_is_counted_and_adds_nothing(granularity: str) -> None:
    case = case_of(channels=4, grid=(4, 2), masked=False, objective="clip") | {"granularity": granularity}
    for index, name in enumerate(LATENTS):
        case[name] = case[name].clone()
        case[name][0, 1, index, 0] = float("inf") if index % 2 else float("nan")
    case["old_log_prob"][0, 6, 3] = float("-inf")
    case["weights"][1, 0, 0] = float("nan")  # covers 2x2 positions
    result, gradient = run(case)
    assert result.metrics["non_finite"] == 6 + 1 + 4
    assert gradient.isfinite().all() and not gradient[0, :, :6, 0].any() and not gradient[0, :, 6, 3].any()
    assert not gradient[1, :, :2, :2].any() and gradient[1, :, 2:].any()
    assert_agrees(case)


@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("with_reference", [pytest.param(False, marks=pytest.mark.exhaustive), True])
@pytest.mark.parametrize(("name", "bad"), SPOILED_COEFFICIENTS)
def test_a_spoiled_coefficient_leaves_out_its_sample(
    granularity: str, with_reference: bool, name: str, bad: float
) -> None:
    if name == "noise_rate" and not with_reference:
        pytest.skip("only the KL reads it")
    case = spoilable_case(granularity, with_reference, name, grid=(2, 2))
    case = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in case.items()}
    case["coefficients"] = case["coefficients"].to(DEVICE)
    assert_a_spoiled_coefficient_leaves_out_its_sample(run, case, name, bad)


def test_an_overflowing_image_is_left_out() -> None:
    # Two tiles.
    assert_an_overflowing_image_is_left_out(run, case_of(grid=(9, 8), masked=False))


def test_the_log_ratio_of_an_image_is_clamped_by_position() -> None:
    assert_the_log_ratio_of_an_image_is_clamped_by_position(run, case_of(masked=False))


@pytest.mark.parametrize("granularity", ["position", "image"])
def test_a_weight_that_overflows_is_left_out(granularity: str) -> None:
    assert_a_weight_that_overflows_is_left_out(run, case_of(masked=False) | {"granularity": granularity})


@pytest.mark.parametrize("granularity", ["position", "image"])
def test_what_is_masked_is_not_looked_at_and_a_sample_without_valid_positions_adds_zero(granularity: str) -> None:
    case = case_of(channels=4, grid=(3, 2), objective="clip") | {"granularity": granularity}
    case["mask"][1] = False
    mask = case["mask"]
    clean = run(case)
    for name in LATENTS:
        case[name] = case[name].masked_fill(~mask[:, None], float("nan"))
    case["advantage"] = case["advantage"].clone()
    case["advantage"][1] = float("nan")
    assert_same(clean, run(case))
    assert not clean[1][1].any() and clean[1][0].any() and clean[0].metrics["non_finite"] == 0
    nothing, gradient = run(case | {"mask": torch.zeros_like(mask)})
    assert not gradient.any() and nothing.loss == 0
    assert all(value == (1 if name.startswith("ratio") else 0) for name, value in nothing.metrics.items())


@pytest.mark.parametrize(("granularity", "sign"), [("position", -1.0), ("image", 1.0)])
def test_an_extreme_log_ratio_overflows_nothing(granularity: str, sign: float) -> None:
    case = without(case_of(channels=4, grid=(2, 2)), "reference_velocity", "weights") | {"granularity": granularity}
    case["old_log_prob"] = case["old_log_prob"] - sign * 1e30
    result, gradient = run(case)
    assert result.metrics["ratio_max"].item() == pytest.approx(torch.tensor(20 * sign).exp().item(), rel=1e-5)
    assert result.loss.isfinite() and result.metrics["non_finite"] == 0 and not gradient.any()


@pytest.mark.parametrize("granularity", ["position", "image"])
def test_the_loss_without_a_gradient_is_the_same(granularity: str) -> None:
    case = case_of(channels=16, grid=(5, 4)) | {"granularity": granularity}
    tracked, _ = run(case)
    with torch.no_grad():
        untracked = policy_loss(**case, backend="triton")
    assert not untracked.loss.requires_grad and torch.equal(untracked.loss, tracked.loss)
    assert all(torch.equal(value, tracked.metrics[name]) for name, value in untracked.metrics.items())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_backward_scales_the_saved_gradient_in_place_unless_the_graph_is_kept(dtype: torch.dtype) -> None:
    case = case_of(channels=4, grid=(2, 3), dtype=dtype)
    velocity = case["velocity"].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = policy_loss(**case, backend="triton").loss
    (original,) = (tensor.clone() for tensor in saved if tensor.shape == velocity.shape)
    kept, again = (torch.autograd.grad(loss, velocity, torch.tensor(4.0), retain_graph=True)[0] for _ in range(2))
    (scaled,) = torch.autograd.grad(loss, velocity, torch.tensor(-0.5))
    assert original.any() and torch.equal(kept, 4 * original) and torch.equal(again, kept)
    assert torch.equal(scaled, -0.5 * original)
    addresses = [tensor.data_ptr() for tensor in saved]
    assert scaled.data_ptr() in addresses and kept.data_ptr() not in addresses


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_backward_casts_a_float16_gradient_after_it_has_been_scaled(layout: torch.memory_format) -> None:
    case = case_of(channels=4, grid=(2, 3), dtype=F16)
    velocity = case["velocity"] = case["velocity"].to(memory_format=layout).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = policy_loss(**case, backend="triton").loss
    (original,) = (tensor.clone() for tensor in saved if tensor.shape == velocity.shape)
    assert original.dtype == F32
    for scale, keep in ((2.0**14, True), (1.0, True), (-(2.0**14), False)):
        (gradient,) = torch.autograd.grad(loss, velocity, torch.tensor(scale, device=DEVICE), retain_graph=keep)
        assert gradient.any() and gradient.stride() == velocity.stride()
        assert torch.equal(gradient, (scale * original).half())


def test_a_single_row_of_coefficients_goes_by_value_and_is_that_row_for_each_sample() -> None:
    case = case_of(batch=2)
    row = transition_coefficients("flow_sde", 0.7, 0.6)
    each = row._map(lambda number: number.expand(2).contiguous()).to(DEVICE)
    for scale in ("variance", "std_dev", "velocity"):
        (one, gradient), (other, other_gradient) = (
            run(case | {"coefficients": coefficients, "kl_scale": scale}) for coefficients in (row, each)
        )
        assert torch.equal(gradient, other_gradient) and torch.equal(one.loss, other.loss)


def test_opcheck() -> None:
    case = case_of(batch=1, channels=2, grid=(1, 2), dtype=BF16)
    case["velocity"].requires_grad_()
    case |= {"objective": "guard", "old_velocity": case["velocity"].detach() + 0.01}
    op = torch.ops.star_kernels.policy_loss.default
    # Not that of the compiler, which looks at a tensor that no caller gets: the gradient, after backward has scaled it.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (*reference.Inputs(**case).flat(), True, "triton"), test_utils=tests)


def test_a_model_that_trains_through_the_kernels_compiles_without_a_graph_break() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 4, 1).to(DEVICE)
    case = without(case_of(channels=4, grid=(2, 2)), "unconditional_velocity")
    sample = case["sample"]

    def loss(scale: float) -> Tensor:
        old = transition_log_prob(case["velocity"], sample, case["next_sample"], case["coefficients"], backend="triton")
        arguments = case | {"velocity": layer(sample), "old_log_prob": old}
        return scale * policy_loss(**arguments, backend="triton").loss

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        function(0.5).backward()
        gradients.append(layer.weight.grad.clone())
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])
