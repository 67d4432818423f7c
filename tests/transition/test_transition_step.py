"""The step and its log-prob: against a plain Gaussian in float64, and what must not change their bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from star_kernels import TransitionCoefficients, transition_coefficients, transition_log_prob, transition_step

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 17), st.integers(1, 9), st.integers(1, 11))


def latents(shape: tuple[int, ...], dtype: torch.dtype, seed: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def rows(batch: int, dtype: torch.dtype = torch.float32) -> TransitionCoefficients:
    sigma = torch.linspace(1.0, 0.2, batch, dtype=dtype)
    return transition_coefficients("flow_sde", sigma, 0.8 * sigma, sigma_max=0.9)


def gaussian(v: Tensor, x: Tensor, c: TransitionCoefficients) -> torch.distributions.Normal:
    a, b, s = (scalars.double()[:, None, None, None] for scalars in (c.sample_scale, c.velocity_scale, c.std))
    return torch.distributions.Normal(a * x.double() + b * v.double(), s)


@SETTINGS
@given(shapes, st.sampled_from(DTYPES), st.integers(0, 99))
def test_log_prob_is_the_channel_mean_of_a_gaussian(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    v, x, noise = latents(shape, dtype, seed)
    c = rows(shape[0])
    next_sample, log_prob = transition_step(v, x, c, noise=noise)
    assert next_sample.dtype == dtype and next_sample.is_contiguous()
    assert log_prob is not None and log_prob.dtype == torch.float32
    expected = gaussian(v, x, c)
    drawn = expected.mean + expected.stddev * noise.double()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert (next_sample.double() - drawn).abs().max() <= tolerance * drawn.abs().max()
    wanted = expected.log_prob(next_sample.double()).mean(1)
    assert (log_prob.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)


@SETTINGS
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.floats(0.0, 7.0), st.integers(0, 99))
def test_step_gives_the_log_prob_of_the_sample_that_is_stored(
    shape: tuple[int, ...], velocity_dtype: torch.dtype, sample_dtype: torch.dtype, guidance: float, seed: int
) -> None:
    v, unconditional = latents(shape, velocity_dtype, seed, 2)
    x, noise = latents(shape, sample_dtype, seed + 1, 2)
    c = rows(shape[0])
    options: dict[str, Any] = {"unconditional_velocity": unconditional, "guidance_scale": guidance}
    step = transition_step(v, x, c, noise=noise, **options)
    assert step.next_sample.dtype == sample_dtype and step.log_prob is not None
    assert torch.equal(step.log_prob, transition_log_prob(v, x, step.next_sample, c, **options))


@SETTINGS
@given(shapes, st.sampled_from(DTYPES), st.integers(0, 99))
def test_a_sample_does_not_depend_on_its_batch(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    v, x, noise = latents(shape, dtype, seed)
    c = rows(shape[0])
    together = transition_step(v, x, c, noise=noise)
    assert together.log_prob is not None
    for index in range(shape[0]):
        one = slice(index, index + 1)
        alone = transition_step(v[one], x[one], c[one], noise=noise[one])
        assert alone.log_prob is not None
        assert torch.equal(alone.next_sample, together.next_sample[one])
        assert torch.equal(alone.log_prob, together.log_prob[one])


@pytest.mark.parametrize("shape", [(3, 16, 61, 67), (2, 16, 64, 64)])
def test_a_large_sample_does_not_depend_on_its_batch_with_two_threads(shape: tuple[int, ...]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        v, x, noise = latents(shape, torch.float32, 0)
        c = rows(1)
        together = transition_step(v, x, c, noise=noise).log_prob
        alone = transition_step(v[1:2], x[1:2], c, noise=noise[1:2]).log_prob
    finally:
        torch.set_num_threads(threads)
    assert together is not None and alone is not None
    assert torch.equal(alone, together[1:2])


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack((x, x), -1)[..., 0],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_layout_does_not_change_a_bit(layout: Any, dtype: torch.dtype) -> None:
    v, x, noise = latents((3, 16, 7, 5), dtype, 3)
    c = rows(3)
    plain = transition_step(v, x, c, noise=noise)
    other = transition_step(layout(v), layout(x), c, noise=layout(noise))
    assert plain.log_prob is not None and other.log_prob is not None
    assert torch.equal(plain.next_sample, other.next_sample) and torch.equal(plain.log_prob, other.log_prob)
    mixed = transition_log_prob(layout(v), x, layout(plain.next_sample), c)
    assert torch.equal(mixed, plain.log_prob)


@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
def test_one_row_of_coefficients_serves_every_sample(kind: str) -> None:
    v, x, noise = latents((4, 3, 5, 2), torch.float32, 5)
    one = transition_step(v, x, transition_coefficients(kind, 0.75, 0.5), noise=noise)
    each = transition_step(v, x, transition_coefficients(kind, torch.full((4,), 0.75), 0.5), noise=noise)
    assert one.log_prob is not None and each.log_prob is not None
    assert torch.equal(one.next_sample, each.next_sample) and torch.equal(one.log_prob, each.log_prob)


def test_a_step_without_noise_has_no_log_prob_and_ignores_noise() -> None:
    v, x, noise = latents((2, 3, 5, 2), torch.float32, 6)
    noise[0, 0, 0, 0] = float("nan")
    for kind, levels in {"ode": (0.75, 0.5), "cps": (0.2, 0.0)}.items():
        c = transition_coefficients(kind, *levels)
        with_noise, without = transition_step(v, x, c, noise=noise), transition_step(v, x, c, noise=None)
        assert with_noise.log_prob is None and without.log_prob is None
        assert torch.equal(with_noise.next_sample, without.next_sample)


def test_guidance_extrapolates_from_the_unconditional_velocity() -> None:
    v, unconditional, x = latents((2, 3, 5, 2), torch.float64, 7)
    c = transition_coefficients("ode", torch.tensor([0.75, 0.5], dtype=torch.float64), 0.25)
    guided = transition_step(v, x, c, noise=None, unconditional_velocity=unconditional, guidance_scale=4.5)
    by_hand = transition_step(unconditional + 4.5 * (v - unconditional), x, c, noise=None)
    torch.testing.assert_close(guided.next_sample, by_hand.next_sample, rtol=1e-12, atol=1e-12)


def test_arithmetic_is_in_float64_only_if_every_floating_input_is() -> None:
    v, x, noise = latents((2, 3, 5, 2), torch.float64, 8)
    exact = transition_step(v, x, rows(2, torch.float64), noise=noise).log_prob
    assert exact is not None and exact.dtype == torch.float64
    for mixed in (
        transition_step(v.float(), x, rows(2, torch.float64), noise=noise),
        transition_step(v, x, rows(2), noise=noise),
        transition_step(v, x, rows(2, torch.float64), noise=noise.half()),
    ):
        assert mixed.log_prob is not None and mixed.log_prob.dtype == torch.float32
        assert mixed.next_sample.dtype == torch.float64
