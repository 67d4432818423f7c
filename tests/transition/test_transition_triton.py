"""The Triton kernels of the transition, interpreted where there is no GPU, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import TransitionCoefficients, transition_coefficients, transition_log_prob, transition_step
from star_kernels.transition import reference

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ROUNDING = {F32: 2e-7, BF16: 2**-8, F16: 2**-11, F64: 1e-15}


def latents(shape: tuple[int, ...], dtype: torch.dtype, seed: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=F64).to(DEVICE, dtype) for _ in range(count)]


def rows(batch: int, dtype: torch.dtype = F32) -> TransitionCoefficients:
    sigma = torch.linspace(1.0, 0.2, batch, dtype=dtype)
    return transition_coefficients("flow_sde", sigma, 0.8 * sigma, sigma_max=0.9).to(DEVICE)


def exact(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def scalars(c: TransitionCoefficients) -> list[Tensor]:
    return [c.sample_drift.double(), c.velocity_scale.double(), c.std.double()]


@pytest.mark.parametrize(
    ("shape", "velocity_dtype", "sample_dtype", "guidance"),
    [
        ((1, 1, 1, 1), F32, F32, None),
        ((2, 4, 3, 5), F32, F32, 4.5),
        ((2, 5, 3, 1), BF16, F32, None),
        ((1, 16, 9, 8), BF16, BF16, 4.5),
        ((1, 16, 5, 13), F16, F16, None),
        ((2, 32, 1, 7), F16, BF16, 1.5),
        ((2, 4, 3, 5), F64, F64, 4.5),
        ((2, 3, 3, 5), F64, F32, None),
    ],
)
def test_agrees_with_the_reference_in_float64(
    shape: tuple[int, ...], velocity_dtype: torch.dtype, sample_dtype: torch.dtype, guidance: float | None
) -> None:
    v, unconditional = latents(shape, velocity_dtype, 0)
    x, noise = latents(shape, sample_dtype, 1)
    c = rows(shape[0], F64 if velocity_dtype == sample_dtype == F64 else F32)
    u = None if guidance is None else unconditional
    options = {"unconditional_velocity": u, "guidance_scale": 1.0 if guidance is None else guidance}
    next_sample, log_prob = transition_step(v, x, c, noise=noise, backend="triton", **options)
    wanted, _ = reference.transition_step(*exact(v, x, noise, u), *scalars(c), guidance_scale=options["guidance_scale"])
    assert next_sample.dtype == sample_dtype and next_sample.is_contiguous()
    assert (next_sample.double() - wanted).abs().max() <= 2 * ROUNDING[sample_dtype] * wanted.abs().max()

    assert log_prob is not None and log_prob.dtype == (F64 if velocity_dtype == sample_dtype == F64 else F32)
    of_stored = reference.transition_log_prob(
        *exact(v, x, next_sample, u), *scalars(c), guidance_scale=options["guidance_scale"]
    )
    tolerance = 1e-12 if log_prob.dtype == F64 else 2e-6
    assert (log_prob.double() - of_stored).abs().max() <= tolerance * of_stored.abs().max().clamp(min=1)
    assert torch.equal(log_prob, transition_log_prob(v, x, next_sample, c, backend="triton", **options))


def test_the_next_sample_is_rounded_to_nearest() -> None:
    (v, x), (noise, _) = latents((1, 16, 2, 8), F32, 2), latents((1, 16, 2, 8), F32, 3)
    # The same numbers, once stored in float32 and once in bfloat16: x is 0 so that its own rounding plays no part.
    x = torch.zeros_like(x)
    fine = transition_step(v, x, rows(1), noise=noise, backend="triton").next_sample
    coarse = transition_step(v, x.bfloat16(), rows(1), noise=noise, backend="triton").next_sample
    assert torch.equal(coarse, fine.bfloat16())


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack((x, x), -1)[..., 0],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat((x, x), 3)[..., : x.shape[3]],
    ],
    ids=["channels_last", "transposed", "strided", "batch inside", "cropped"],
)
def test_memory_layout_does_not_change_a_bit(layout: Any) -> None:
    (v, x), (noise, _) = latents((2, 16, 5, 3), BF16, 3), latents((2, 16, 5, 3), F32, 4)
    c = rows(2)
    plain = transition_step(v, x, c, noise=noise, backend="triton")
    other = transition_step(layout(v), layout(x), c, noise=layout(noise), backend="triton")
    assert plain.log_prob is not None and other.log_prob is not None
    assert torch.equal(plain.next_sample, other.next_sample) and torch.equal(plain.log_prob, other.log_prob)
    assert torch.equal(transition_log_prob(layout(v), x, plain.next_sample, c, backend="triton"), plain.log_prob)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    (v, x), (noise, _) = latents((3, 16, 9, 8), F32, 5), latents((3, 16, 9, 8), F32, 6)
    c = rows(3)
    together = transition_step(v, x, c, noise=noise, backend="triton")
    assert together.log_prob is not None
    one = slice(1, 2)
    alone = transition_step(v[one], x[one], c[one], noise=noise[one], backend="triton")
    assert alone.log_prob is not None
    assert torch.equal(alone.next_sample, together.next_sample[one])
    assert torch.equal(alone.log_prob, together.log_prob[one])


def test_a_step_without_noise_is_the_mean() -> None:
    v, x = latents((2, 3, 5, 2), F32, 7)
    c = transition_coefficients("ode", 0.75, 0.5).to(DEVICE)
    step = transition_step(v, x, c, noise=None, backend="triton")
    torch.testing.assert_close(step.next_sample, x - 0.25 * v)
    assert step.log_prob is None


def test_one_row_of_coefficients_serves_every_sample() -> None:
    (v, x), (noise, _) = latents((3, 3, 5, 2), F32, 8), latents((3, 3, 5, 2), F32, 9)
    row, each = (transition_coefficients("cps", sigma, 0.5).to(DEVICE) for sigma in (0.75, torch.full((3,), 0.75)))
    one = transition_step(v, x, row, noise=noise, backend="triton")
    many = transition_step(v, x, each, noise=noise, backend="triton")
    assert one.log_prob is not None and many.log_prob is not None
    assert torch.equal(one.next_sample, many.next_sample) and torch.equal(one.log_prob, many.log_prob)


def test_a_position_that_is_not_finite_stays_alone() -> None:
    v, x = latents((1, 4, 4, 4), F32, 10)
    clean = transition_log_prob(v, x, v, rows(1), backend="triton")
    v[0, 2, 1, 3] = float("nan")
    log_prob = transition_log_prob(v, x, v.nan_to_num(), rows(1), backend="triton")
    assert log_prob.isnan().nonzero().tolist() == [[0, 1, 3]]
    others = ~log_prob.isnan()
    assert torch.equal(log_prob[others], clean[others])


def test_gradients_reach_velocity_and_samples() -> None:
    (v, x), (noise, y) = latents((2, 5, 3, 2), F32, 11), latents((2, 5, 3, 2), F32, 12)
    c = rows(2)
    gradients = []
    for backend, dtype in (("triton", F32), ("reference", F64)):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (v, x, y)]
        coefficients = c._map(lambda row, dtype=dtype: row.to(dtype))  # type: ignore[misc]
        log_prob = transition_log_prob(*inputs, coefficients, backend=backend)
        step = transition_step(*inputs[:2], coefficients, noise=noise.to(dtype), backend=backend)
        gradients.append(torch.autograd.grad(log_prob.mean() + step.next_sample.square().mean(), inputs))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_opcheck() -> None:
    v, x = (tensor.requires_grad_() for tensor in latents((1, 3, 2, 2), BF16, 13))
    c = rows(1)
    ops = torch.ops.star_kernels
    arguments = (c.sample_drift, c.velocity_scale, c.std, 2.5, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.transition_step.default, (v, x, v.detach(), x.detach(), *arguments), test_utils=tests)
    torch.library.opcheck(ops.transition_log_prob.default, (v, x, x, None, *arguments), test_utils=tests)
