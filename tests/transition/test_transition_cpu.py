"""The C++ kernels of the transition, on every instruction set of this CPU, against the definition in float64."""

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

import star_kernels as sk

pytestmark = pytest.mark.skipif(sk.available_backends()["cpu"] is not None, reason="the C++ extension is not built")

LEVELS = ["default", "avx2", "avx512"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CPU: dict[str, Any] = {"backend": "cpu"}


@contextmanager
def level(name: str) -> Iterator[None]:
    # Not monkeypatch, which hypothesis would not undo between examples.
    os.environ["STAR_KERNELS_CPU_CAPABILITY"] = name
    try:
        yield
    finally:
        del os.environ["STAR_KERNELS_CPU_CAPABILITY"]


def latents(shape: tuple[int, ...], count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def rows(batch: int) -> sk.TransitionCoefficients:
    sigma = torch.linspace(1.0, 0.2, batch)
    return sk.transition_coefficients("flow_sde", sigma, 0.8 * sigma, sigma_max=0.9)


@pytest.mark.parametrize("name", LEVELS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 2, 3, 4, 8, 16, 17, 32]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=4, max_size=4),
    channels_last=st.lists(st.booleans(), min_size=4, max_size=4),
    guidance=st.sampled_from([None, 0.0, 1.0, 4.5]),
    noisy=st.booleans(),
    seed=st.integers(0, 99),
)
def test_agrees_with_float64_whatever_the_shape_dtypes_and_layouts(
    name: str,
    batch: int,
    channels: int,
    size: tuple[int, int],
    dtypes: list[torch.dtype],
    channels_last: list[bool],
    guidance: float | None,
    noisy: bool,
    seed: int,
) -> None:
    v, u, x, noise = (
        latent.to(dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
        for latent, dtype, last in zip(latents((batch, channels, *size), seed=seed), dtypes, channels_last, strict=True)
    )
    options: dict[str, Any] = {}
    if guidance is not None:
        options = {"unconditional_velocity": u, "guidance_scale": guidance}
    exact_options = {key: value.double() if isinstance(value, Tensor) else value for key, value in options.items()}
    c = rows(batch) if noisy else sk.transition_coefficients("ode", 0.7, 0.5)
    with level(name):
        step = sk.transition_step(v, x, c, noise=noise, **options, **CPU)
    exact = c._map(Tensor.double)
    mean = sk.transition_step(v.double(), x.double(), exact, noise=noise.double(), **exact_options).next_sample
    tolerance = 1e-6 if x.dtype == torch.float32 else 1e-2
    assert step.next_sample.dtype == x.dtype and step.next_sample.is_contiguous()
    assert (step.next_sample.double() - mean).abs().max() <= tolerance * mean.abs().max()
    if not noisy:
        assert step.log_prob is None
        return
    assert step.log_prob is not None and step.log_prob.dtype == torch.float32
    stored = sk.transition_log_prob(v.double(), x.double(), step.next_sample.double(), exact, **exact_options)
    assert ((step.log_prob.double() - stored).abs() <= 1e-5 * stored.abs().clamp(min=1)).all()
    with level(name):
        again = sk.transition_log_prob(v, x, step.next_sample, c, **options, **CPU)
        other = step.next_sample.to(memory_format=torch.channels_last)
        assert torch.equal(again, step.log_prob)
        assert torch.equal(sk.transition_log_prob(v, x, other, c, **options, **CPU), step.log_prob)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_depends_neither_on_its_batch_nor_on_the_threads(name: str, dtype: torch.dtype, threads: int) -> None:
    v, x, noise, _ = (latent.to(dtype) for latent in latents((3, 5, 61, 47)))
    c = rows(3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with level(name):
            together = sk.transition_step(v, x, c, noise=noise, **CPU)
            for index in range(3):
                one = slice(index, index + 1)
                torch.set_num_threads(1)
                alone = sk.transition_step(v[one], x[one], c[one], noise=noise[one], **CPU)
                assert alone.log_prob is not None and together.log_prob is not None
                assert torch.equal(alone.next_sample, together.next_sample[one])
                assert torch.equal(alone.log_prob, together.log_prob[one])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize(("size", "dtype"), [((64, 64), torch.float32), ((74, 62), torch.bfloat16)])
@pytest.mark.parametrize("guided", [False, True])
def test_what_goes_past_the_caches_has_the_same_bits(
    name: str, size: tuple[int, int], dtype: torch.dtype, guided: bool
) -> None:
    v, x, noise, u = latents((64, 16, *size))
    v, u, x = v.to(dtype), u.to(dtype), x.to(dtype)
    c = rows(64)

    def options(samples: slice) -> dict[str, Any]:
        return {"unconditional_velocity": u[samples], "guidance_scale": 2.5} if guided else {}

    def step(samples: slice) -> sk.TransitionStep:
        return sk.transition_step(v[samples], x[samples], c[samples], noise=noise[samples], **options(samples), **CPU)

    everything = slice(0, 64)
    with level(name):
        together = step(everything)
        again = sk.transition_log_prob(v, x, together.next_sample, c, **options(everything), **CPU)
        assert together.log_prob is not None and torch.equal(again, together.log_prob)
        for index in (0, 31, 32, 63):
            alone = step(slice(index, index + 1))
            assert alone.log_prob is not None
            assert torch.equal(alone.next_sample, together.next_sample[index : index + 1])
            assert torch.equal(alone.log_prob, together.log_prob[index : index + 1])


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_pytorch_for_every_kind_of_number(name: str, dtype: torch.dtype) -> None:
    """Halfway cases, subnormal, huge, infinite and NaN, through a step that gives its sample back."""
    bits = torch.arange(0, 2**32, 65537 * 7, dtype=torch.int64).to(torch.int32)
    halves = ((torch.arange(0, 2**16, 5) << 16) + 0x8000).to(torch.int32)
    numbers = torch.cat([bits, halves, halves + 1, halves - 1]).view(torch.float32)
    numbers = torch.cat([numbers, torch.tensor([0.0, -0.0, float("inf"), float("nan"), 65519.0, 65520.0, 6e-8, 3e-8])])
    # a − 1 = 0 and s = 1: x' = x + 1·ε with x = 0 in the dtype that the next sample gets.
    c = sk.TransitionCoefficients(torch.zeros(1), torch.zeros(1), torch.ones(1))
    noise = numbers.view(1, 1, 1, -1)
    zero = torch.zeros(noise.shape, dtype=dtype)
    with level(name):
        got = sk.transition_step(zero, zero, c, noise=noise, **CPU).next_sample
    wanted = noise.to(dtype)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_a_non_finite_number_spoils_its_own_position_only(spoiled: int) -> None:
    shape = (2, 3, 9, 15)
    tensors = latents(shape, 3)
    c = rows(2)
    v, x, noise = tensors
    plain = sk.transition_step(v, x, c, noise=noise, **CPU).log_prob
    tensors[spoiled] = tensors[spoiled].clone()
    tensors[spoiled][1, 2, 4, 7] = float("nan")
    v, x, noise = tensors
    bad = sk.transition_step(v, x, c, noise=noise, **CPU).log_prob
    assert plain is not None and bad is not None and bad[1, 4, 7].isnan() and bad.isnan().sum() == 1
    bad[1, 4, 7] = plain[1, 4, 7]
    assert torch.equal(bad, plain)


def test_float64_runs_on_the_definition() -> None:
    v, x, noise, _ = (latent.double() for latent in latents((2, 3, 5, 4)))
    c = rows(2)._map(Tensor.double)
    got = sk.transition_step(v, x, c, noise=noise, **CPU)
    wanted = sk.transition_step(v, x, c, noise=noise, backend="reference")
    assert got.log_prob is not None and wanted.log_prob is not None and got.log_prob.dtype == torch.float64
    assert torch.equal(got.next_sample, wanted.next_sample) and torch.equal(got.log_prob, wanted.log_prob)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_of_the_kernels_behind_the_operators(dtype: torch.dtype) -> None:
    v, u, x, noise = (latent.to(dtype) for latent in latents((2, 3, 5, 4)))
    c = rows(2)
    scalars = (c.sample_drift, c.velocity_scale, c.std)
    ops = torch.ops.star_kernels
    for draw in (noise, None):
        torch.library.opcheck(ops.transition_step.default, (v.requires_grad_(), x, draw, u, *scalars, 2.5, "cpu"))
    torch.library.opcheck(ops.transition_log_prob.default, (v, x, noise, u, *scalars, 2.5, "cpu"))


def test_the_log_probs_gradients_are_those_of_the_definition() -> None:
    v, u, x, noise = latents((2, 3, 5, 4))
    results = []
    for backend in ("cpu", "reference"):
        inputs = [latent.clone().requires_grad_() for latent in (v, x, noise)]
        log_prob = sk.transition_log_prob(
            *inputs, rows(2), unconditional_velocity=u, guidance_scale=2.5, backend=backend
        )
        results.append(torch.autograd.grad(log_prob.square().sum(), inputs))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
