"""The C++ kernel of the loss, on every instruction set of this CPU, against the definition in float64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import star_kernels as sk
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

pytestmark = pytest.mark.skipif(sk.available_backends()["cpu"] is not None, reason="the C++ extension is not built")

LEVELS = ["default", "avx2", "avx512"]
LATENTS = ("velocity", "sample", "next_sample", "reference_velocity", "unconditional_velocity", "old_velocity")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def level(name: str) -> Iterator[None]:
    # Not monkeypatch, which hypothesis would not undo between examples.
    os.environ["STAR_KERNELS_CPU_CAPABILITY"] = name
    try:
        yield
    finally:
        del os.environ["STAR_KERNELS_CPU_CAPABILITY"]


def run(case: dict[str, Any], backend: str = "cpu", scale: float = 1.0) -> tuple[sk.PolicyLoss, Tensor]:
    """The loss, and the gradient of `scale` times the loss."""
    velocity = case["velocity"].detach().requires_grad_()
    result = sk.policy_loss(**{**case, "velocity": velocity, "backend": backend})
    (gradient,) = torch.autograd.grad(scale * result.loss, velocity)
    return result, gradient


def in_float64(case: dict[str, Any]) -> dict[str, Any]:
    exact = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.items()
    }
    return exact | {"coefficients": case["coefficients"]._map(Tensor.double)}


def assert_agrees(case: dict[str, Any]) -> None:
    # Without a loss scale most of the gradient is below the normal numbers of float16.
    scale = 2.0**14 if case["velocity"].dtype == torch.float16 else 1.0
    (got, gradient), (exact, exact_gradient) = run(case, scale=scale), run(in_float64(case), "reference", scale)
    assert exact.loss.dtype == torch.float64 and gradient.dtype == case["velocity"].dtype
    tolerance = 1e-5 if gradient.dtype == torch.float32 else 1e-2
    assert (gradient.double() - exact_gradient).norm() <= tolerance * exact_gradient.norm() + 1e-12
    terms = exact.metrics["policy_loss"].abs() + case["kl_weight"] * exact.metrics["kl"]
    # Terms of both signs may cancel, and a ratio of fp32 log-probs is known to about 1e-6.
    assert (got.loss - exact.loss).abs() <= 1e-5 * (terms + 1)
    for name in ("policy_loss", "kl", "ratio_mean", "ratio_min", "ratio_max", "clip_fraction", "non_finite"):
        torch.testing.assert_close(got.metrics[name].double(), exact.metrics[name], rtol=1e-5, atol=1e-5)
    assert got.metrics.keys() == exact.metrics.keys() and ("divergence" in got.metrics) == ("old_velocity" in case)
    if "divergence" in got.metrics:
        torch.testing.assert_close(got.metrics["divergence"].double(), exact.metrics["divergence"], rtol=1e-5, atol=0)
    torch.testing.assert_close(got.metrics["approx_kl"].double(), exact.metrics["approx_kl"], rtol=1e-4, atol=1e-8)


def slice_case(case: dict[str, Any], rows: slice) -> dict[str, Any]:
    sliced = {name: value[rows] if isinstance(value, Tensor) else value for name, value in case.items()}
    return sliced | {"coefficients": case["coefficients"][rows]}


@pytest.mark.parametrize("name", LEVELS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 32]),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 23)),
    patch=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=6, max_size=6),
    channels_last=st.lists(st.booleans(), min_size=6, max_size=6),
    granularity=st.sampled_from(["position", "image"]),
    objective=st.sampled_from([None, *reference.OBJECTIVES]),
    masked=st.booleans(),
    weighted=st.booleans(),
    kl=st.sampled_from(["none", "reported", "variance", "std_dev", "velocity"]),
    guidance=st.sampled_from([None, 1.0, 3.5]),
)
def test_agrees_with_float64_whatever_the_shape_dtypes_layouts_and_options(
    name: str,
    seed: int,
    batch: int,
    channels: int,
    grid: tuple[int, int],
    patch: tuple[int, int],
    dtypes: list[torch.dtype],
    channels_last: list[bool],
    granularity: str,
    objective: str | None,
    masked: bool,
    weighted: bool,
    kl: str,
    guidance: float | None,
) -> None:
    shape: dict[str, Any] = {"seed": seed, "batch": batch, "channels": channels, "grid": grid, "patch": patch}
    case = make_case(**shape, move=0.02, masked=masked, objective=objective)
    # No ratio may be so near a bound that rounding decides which branch it takes, and no divergence near its limit.
    case |= {"granularity": granularity, "clip_range": (0.9, 0.95), "divergence_limit": 1e3}
    if guidance is not None:
        case |= {"unconditional_velocity": case["velocity"] + 0.01, "guidance_scale": guidance}
    for latent, dtype, last in zip(LATENTS, dtypes, channels_last, strict=True):
        if latent in case:
            layout = torch.channels_last if last else torch.contiguous_format
            case[latent] = case[latent].to(dtype=dtype, memory_format=layout)
    if not weighted:
        case["weights"] = None
    if kl == "none":
        case |= {"reference_velocity": None, "kl_weight": 0.0}
    elif kl == "reported":
        case["kl_weight"] = 0.0
    else:
        case["kl_scale"] = kl
    # The rollout's log-prob is that of the latents as they are after rounding.
    options = {key: case[key] for key in ("unconditional_velocity", "guidance_scale") if key in case}
    exact = in_float64(case)
    exact_options = {key: exact[key] for key in options}
    old = sk.transition_log_prob(
        exact["velocity"], exact["sample"], exact["next_sample"], exact["coefficients"], **exact_options
    )
    case["old_log_prob"] = (old + 0.1 * torch.sin(torch.arange(old.numel()).view(old.shape))).float()
    with level(name):
        assert_agrees(case)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("objective", [None, "guard", "dppo"])
def test_clipping_acts_where_it_does_in_float64(name: str, granularity: str, objective: str | None) -> None:
    clipped = 0.0
    for seed in range(8):
        case = make_case(seed=seed, channels=4, grid=(9, 11), move=0.05, objective=objective)
        case |= {"granularity": granularity}
        case["clip_range"] = (0.005, 0.01) if granularity == "position" else (2e-4, 5e-4)
        with level(name):
            got, gradient = run(case)
        exact, exact_gradient = run(in_float64(case), "reference")
        clipped += exact.metrics["clip_fraction"].item() / 8
        assert got.metrics["clip_fraction"].item() == pytest.approx(exact.metrics["clip_fraction"].item(), abs=1e-6)
        assert (gradient.double() - exact_gradient).norm() <= 1e-5 * exact_gradient.norm()
    assert 0.1 < clipped < 0.95


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("objective", [None, "guard", "dppo"])
def test_a_sample_depends_neither_on_its_batch_nor_on_the_threads(
    name: str, granularity: str, dtype: torch.dtype, objective: str | None
) -> None:
    before, threads = torch.get_num_threads(), 2
    # More than one block of positions, a last one that is not full, and log-ratios large enough to show a last bit.
    case = make_case(batch=4, channels=5, grid=(31, 23), patch=(2, 2), dtype=dtype, move=1.0, objective=objective)
    case |= {"granularity": granularity, "clip_range": 0.5}
    if dtype == torch.float16:
        # Its gradient has numbers so small that four times less is rounded.
        case["velocity"] = case["velocity"].float()
    try:
        with level(name):
            torch.set_num_threads(1)
            expected, together = run(case)
            torch.set_num_threads(threads)
            again, same = run(case)
            assert torch.equal(same, together) and torch.equal(again.loss, expected.loss)
            for metric in expected.metrics:
                assert torch.equal(again.metrics[metric], expected.metrics[metric]), metric
            for index in range(4):
                one = slice(index, index + 1)
                # 1/4 is exact, so that the bits have to be the same.
                assert torch.equal(run(slice_case(case, one))[1], 4 * together[one])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("guidance", [None, 4.5])
def test_on_policy_ratios_are_exactly_1(
    name: str, dtype: torch.dtype, channels_last: bool, guidance: float | None
) -> None:
    case = make_case(channels=16, grid=(17, 9), dtype=dtype, masked=False) | {"kl_weight": 0.0}
    options: dict[str, Any] = {}
    if guidance is not None:
        options = {"unconditional_velocity": case["velocity"] + 0.01, "guidance_scale": guidance}
    noise = torch.randn(case["sample"].shape, generator=torch.Generator().manual_seed(1))
    with level(name):
        step = sk.transition_step(
            case["velocity"], case["sample"], case["coefficients"], noise=noise, backend="cpu", **options
        )
        case |= {"next_sample": step.next_sample, "old_log_prob": step.log_prob, **options}
        if channels_last:
            case["velocity"] = case["velocity"].to(memory_format=torch.channels_last)
        result, _ = run(case)
    assert result.metrics["ratio_min"] == result.metrics["ratio_max"] == result.metrics["ratio_mean"] == 1
    assert result.metrics["approx_kl"] == 0 and result.metrics["clip_fraction"] == 0


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("argument", [*LATENTS, "old_log_prob", "advantage", "weights"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_number_leaves_out_the_positions_it_reaches(
    name: str, granularity: str, argument: str, bad: float
) -> None:
    if argument == "weights" and bad < 0:
        pytest.skip("a negative weight is an error")
    case = make_case(channels=3, grid=(9, 13), objective="clip") | {"granularity": granularity, "clip_range": 0.5}
    case |= {"unconditional_velocity": case["velocity"] + 0.01, "guidance_scale": 1.5}
    case[argument] = case[argument].clone()
    case[argument][(0,) * case[argument].dim()] = bad
    with level(name):
        got, gradient = run(case)
    exact, exact_gradient = run(in_float64(case), "reference")
    assert got.metrics["non_finite"] == exact.metrics["non_finite"] > 0
    assert gradient.isfinite().all() and torch.equal(gradient == 0, exact_gradient == 0)
    assert got.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5, abs=1e-5)
    assert (gradient.double() - exact_gradient).norm() <= 1e-5 * exact_gradient.norm()


@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize(("name", "bad"), SPOILED_COEFFICIENTS)
def test_a_spoiled_coefficient_leaves_out_its_sample(
    granularity: str, with_reference: bool, name: str, bad: float
) -> None:
    if name == "noise_rate" and not with_reference:
        pytest.skip("only the KL reads it")
    # More than one tile of positions, the last one not full.
    case = spoilable_case(granularity, with_reference, name, grid=(9, 13))
    for instructions in LEVELS:
        with level(instructions):
            assert_a_spoiled_coefficient_leaves_out_its_sample(run, case, name, bad)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("byte", [2, 128, 255])
def test_any_byte_of_a_mask_but_zero_is_valid(name: str, granularity: str, byte: int) -> None:
    case = make_case(channels=3, grid=(9, 13)) | {"granularity": granularity}
    bytes_of_mask = case["mask"].to(torch.uint8) * byte
    with level(name):
        (expected, gradient), (got, same) = run(case), run(case | {"mask": bytes_of_mask.view(torch.bool)})
    assert got.metrics["non_finite"] == 0 and torch.equal(got.loss, expected.loss) and torch.equal(same, gradient)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("grid", [(3, 4), (9, 13), (33, 32)])
def test_an_overflowing_image_is_left_out(name: str, grid: tuple[int, int]) -> None:
    with level(name):
        assert_an_overflowing_image_is_left_out(run, make_case(grid=grid, masked=False))


@pytest.mark.parametrize("name", LEVELS)
def test_the_log_ratio_of_an_image_is_clamped_by_position(name: str) -> None:
    with level(name):
        assert_the_log_ratio_of_an_image_is_clamped_by_position(run, make_case(grid=(9, 13), masked=False))


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("grid", [(3, 4), (9, 13)])
def test_a_weight_that_overflows_is_left_out(name: str, granularity: str, grid: tuple[int, int]) -> None:
    with level(name):
        case = make_case(grid=grid, masked=False) | {"granularity": granularity}
        assert_a_weight_that_overflows_is_left_out(run, case)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("granularity", ["position", "image"])
# A sample that is one long row per channel, and one of a long and a short one, which ends within a tile.
@pytest.mark.parametrize(
    ("grid", "dtype", "layout", "kl_weight", "objective"),
    [
        ((32, 32), torch.float32, torch.contiguous_format, None, None),
        pytest.param((37, 31), torch.float32, torch.contiguous_format, 0.0, "guard", marks=pytest.mark.exhaustive),
        ((37, 31), torch.bfloat16, torch.contiguous_format, 0.05, None),
        ((32, 32), torch.float32, torch.channels_last, None, "dppo"),
    ],
)
def test_what_goes_past_the_caches_has_the_same_bits(
    name: str,
    granularity: str,
    grid: tuple[int, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    kl_weight: float | None,
    objective: str | None,
) -> None:
    # 8 MB of velocities and more. One tile has a position that does not count.
    batch = 64 if dtype == torch.bfloat16 else 32
    case = make_case(batch=batch, channels=16, grid=grid, masked=False, objective=objective)
    case |= {"granularity": granularity}
    case["next_sample"][5, 3, 17, 9] = float("nan")
    for key in ("velocity", "reference_velocity"):
        case[key] = case[key].to(dtype)
    if kl_weight is None:
        case |= {"reference_velocity": None, "kl_weight": 0.0}
    else:
        case |= {"unconditional_velocity": case["sample"].to(dtype), "guidance_scale": 2.5, "kl_weight": kl_weight}
    case = {
        key: value.to(memory_format=layout) if key in LATENTS and value is not None else value
        for key, value in case.items()
    }
    before = torch.get_num_threads()
    try:
        with level(name):
            # Three threads cut within samples.
            torch.set_num_threads(3)
            result, together = run(case)
            torch.set_num_threads(before)
            assert result.metrics["non_finite"] == 1
            for index in (0, 4, 5, 6, batch - 1):
                one = slice(index, index + 1)
                alone = {key: value[one] if isinstance(value, Tensor) else value for key, value in case.items()}
                alone["coefficients"] = case["coefficients"][one]
                assert torch.equal(run(alone)[1], batch * together[one])
    finally:
        torch.set_num_threads(before)
    expected, _ = run(case, "reference")
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-4, atol=1e-6)
    for metric in ("kl", "clip_fraction", "ratio_mean", "approx_kl", "non_finite"):
        torch.testing.assert_close(result.metrics[metric], expected.metrics[metric], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", LEVELS)
def test_without_an_advantage_there_is_no_policy_gradient(name: str) -> None:
    case = make_case(channels=16, grid=(9, 13)) | {"kl_weight": 0.0}
    case["advantage"] = torch.zeros_like(case["advantage"])
    with level(name):
        result, gradient = run(case)
    assert result.loss == 0 and not gradient.any()


@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_memory_format_changes_no_bit(granularity: str, dtype: torch.dtype) -> None:
    for channels in (1, 2, 4, 7, 8, 16, 32):
        case = make_case(channels=channels, grid=(9, 13), dtype=dtype, objective="guard") | {"granularity": granularity}
        other = {
            key: value.to(memory_format=torch.channels_last) if key in LATENTS else value for key, value in case.items()
        }
        (plain, gradient), (same, same_gradient) = run(case), run(other)
        assert torch.equal(plain.loss, same.loss) and torch.equal(gradient, same_gradient)


def test_float64_latents_run_on_the_definition() -> None:
    case = make_case(dtype=torch.float64)
    (got, gradient), (exact, exact_gradient) = run(case, "cpu"), run(case, "reference")
    assert torch.equal(got.loss, exact.loss) and torch.equal(gradient, exact_gradient)


@pytest.mark.parametrize("weights", [torch.tensor([-1e-3]), torch.tensor([float("nan")])])
def test_a_negative_weight_is_refused_and_nan_is_not(weights: Tensor) -> None:
    case = make_case(masked=False)
    case["weights"] = case["weights"].clone()
    case["weights"][-1, -1, -1] = weights
    if weights.isnan():
        assert run(case)[0].metrics["non_finite"] == 4
        return
    with pytest.raises(ValueError, match="^weights: expected numbers of at least 0, got -0.001"):
        run(case)


def test_gradients_accumulate_over_several_backward_passes() -> None:
    case = make_case(channels=4)
    layer = torch.nn.Conv2d(4, 4, 1)
    totals = []
    for backend in ("reference", "cpu"):
        layer.zero_grad()
        for scale in (1.0, 0.25, 1.0):
            (scale * sk.policy_loss(**{**case, "velocity": layer(case["sample"]), "backend": backend}).loss).backward()
        assert layer.weight.grad is not None
        totals.append(layer.weight.grad.clone())
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-4, atol=1e-7)


def test_a_velocity_from_autocast_gets_its_gradient_in_bfloat16() -> None:
    case = make_case(channels=4)
    layer = torch.nn.Conv2d(4, 4, 1)
    seen: list[torch.dtype] = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = layer(case["sample"])
        velocity.register_hook(lambda gradient: seen.append(gradient.dtype))
        loss = sk.policy_loss(**{**case, "velocity": velocity, "backend": "cpu"}).loss
    loss.backward()
    assert velocity.dtype == torch.bfloat16 and seen == [torch.bfloat16] and loss.dtype == torch.float32
    assert layer.weight.grad is not None and layer.weight.grad.any()


class _LargeResults(TorchDispatchMode):
    """Storages of at least `size` bytes that operators return and that no argument had."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= self.size:
                self.found.add(value.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "keep", "gradients"),
    [
        (torch.float32, False, 1),
        (torch.bfloat16, False, 1),
        # In float32 until it has been scaled.
        (torch.float16, False, 3),
        (torch.float32, True, 2),
        (torch.bfloat16, True, 2),
        (torch.float16, True, 3),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_step_takes_the_memory_of_few_gradients(
    granularity: str, layout: torch.memory_format, dtype: torch.dtype, keep: bool, gradients: int, scale: float
) -> None:
    case = make_case(channels=16, grid=(32, 32), batch=4, dtype=dtype) | {"granularity": granularity}
    case["velocity"] = case["velocity"].to(memory_format=layout)
    peaks = {backend: peak_of_a_step(case, backend, keep, scale) for backend in ("cpu", "reference")}
    size = case["velocity"].nbytes
    # Beside the gradients: scratch of the threads, and per-position and per-sample numbers.
    assert gradients * size <= peaks["cpu"] < (gradients + 0.6) * size
    assert peaks["reference"] > 2 * gradients * size


def peak_of_a_step(case: dict[str, Any], backend: str, keep: bool, scale: float) -> int:
    """Bytes that forward and backward hold at most, beyond what was there before, from PyTorch's allocator."""
    velocity = case["velocity"].detach().requires_grad_()
    arguments = {**case, "velocity": velocity, "backend": backend}

    def step() -> Tensor:
        loss = sk.policy_loss(**arguments).loss
        loss.backward(torch.tensor(scale), retain_graph=keep)
        return loss

    step()
    velocity.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = step()
    del kept
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_kept_graph_keeps_its_gradient(dtype: torch.dtype, layout: torch.memory_format) -> None:
    # More entries than are scaled at a time.
    case = make_case(channels=16, grid=(23, 23), dtype=dtype) | {"backend": "cpu"}
    velocity = case["velocity"] = case["velocity"].to(memory_format=layout).requires_grad_()
    loss = sk.policy_loss(**case).loss
    scales = [(2.0**14, True), (1.0, True), (0.3, True), (2.0**14, False)]
    first, plain, third, last = (
        torch.autograd.grad(loss, velocity, torch.tensor(scale), retain_graph=keep)[0] for scale, keep in scales
    )
    assert first.any() and torch.equal(first, last) and first.stride() == velocity.stride()
    for gradient, scale in ((plain, 1.0), (third, 0.3)):
        exact = first.double() * (scale / 2.0**14)
        torch.testing.assert_close(gradient.double(), exact, rtol=torch.finfo(dtype).eps, atol=6e-8)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_makes_no_second_tensor_of_the_latents_size(layout: torch.memory_format) -> None:
    case = make_case(channels=16, grid=(32, 32), batch=4) | {"backend": "cpu"}
    case["velocity"] = velocity = case["velocity"].to(memory_format=layout).requires_grad_()
    with _LargeResults(velocity.nbytes) as large:
        sk.policy_loss(**case).loss.backward()
    assert velocity.grad is not None
    assert large.found <= {velocity.grad.untyped_storage().data_ptr()}


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_of_the_kernel_behind_the_operator(dtype: torch.dtype, with_gradient: bool) -> None:
    case = make_case(dtype=dtype, objective="dppo")
    case["velocity"].requires_grad_(with_gradient)
    inputs = reference.Inputs(**case).flat()
    torch.library.opcheck(torch.ops.star_kernels.policy_loss.default, (*inputs, with_gradient, "cpu"))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_compiled_step_runs_the_kernel_without_a_graph_break(channels_last: bool) -> None:
    case = make_case(channels=4) | {"backend": "cpu"}
    layout = torch.channels_last if channels_last else torch.contiguous_format
    sample = case["sample"].to(memory_format=layout)
    layer = torch.nn.Conv2d(4, 4, 3, padding=1).to(memory_format=layout)

    def step(x: Tensor) -> Tensor:
        return sk.policy_loss(**{**case, "velocity": layer(x)}).loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        function(sample).backward()
        assert layer.weight.grad is not None
        results.append(layer.weight.grad.clone())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
