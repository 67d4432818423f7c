"""Coefficients of every sampler against the published steps, and against what a sampler has to preserve."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from star_kernels import TransitionCoefficients, policy_loss, transition_coefficients, transition_step
from tests.policy_loss.cases import make_case

SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)
sigmas = st.floats(0.02, 1.0)
fractions = st.floats(0.0, 0.98)


def double(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def scalars(coefficients: TransitionCoefficients) -> tuple[float, float, float]:
    return coefficients.sample_scale.item(), coefficients.velocity_scale.item(), coefficients.std.item()


@SETTINGS
@given(sigmas, fractions, st.floats(0.05, 1.5), st.floats(-3, 3), st.floats(-3, 3))
def test_dance_sde_is_the_published_step(sigma: float, fraction: float, eta: float, x: float, v: float) -> None:
    sigma_next = sigma * fraction
    coefficients = transition_coefficients("dance_sde", *double(sigma, sigma_next), eta=eta)
    image = x - sigma * v
    score = ((1 - sigma) * image - x) / (sigma * sigma)
    down = sigma - sigma_next
    published = x - down * v + 0.5 * eta * eta * score * down
    a, b, s = scalars(coefficients)
    assert a * x + b * v == pytest.approx(published, rel=1e-9, abs=1e-9)
    assert s == pytest.approx(eta * math.sqrt(down), rel=1e-12)
    assert coefficients.noise_rate is not None and coefficients.noise_rate.item() == pytest.approx(eta)


@SETTINGS
@given(sigmas, fractions, st.floats(0.0, 1.0), st.floats(-3, 3), st.floats(-3, 3))
def test_cps_is_the_published_step(sigma: float, fraction: float, eta: float, x: float, v: float) -> None:
    sigma_next = sigma * fraction
    coefficients = transition_coefficients("cps", *double(sigma, sigma_next), eta=eta)
    spread = sigma_next * math.sin(eta * math.pi / 2)
    image, noise = x - sigma * v, x + (1 - sigma) * v
    published = (1 - sigma_next) * image + math.sqrt(max(sigma_next**2 - spread**2, 0.0)) * noise
    a, b, s = scalars(coefficients)
    # Near eta = 1 the square root of the difference loses digits; the library takes the cosine instead.
    assert a * x + b * v == pytest.approx(published, rel=1e-7, abs=1e-6)
    assert s == pytest.approx(spread, abs=1e-15)
    assert coefficients.noise_rate is None


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_is_the_step_of_the_diffusers_scheduler(eta: float, steps: int) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x, v, noise = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    stride = scheduler.config.num_train_timesteps // steps
    for timestep in scheduler.timesteps[:-1].tolist():
        expected = scheduler.step(v, timestep, x, eta=eta, variance_noise=noise).prev_sample
        now, after = scheduler.alphas_cumprod[timestep], scheduler.alphas_cumprod[timestep - stride]
        coefficients = transition_coefficients("ddim", now, after, eta=eta)
        got = transition_step(v, x, coefficients, noise=noise if eta else None).next_sample
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [4, 28])
def test_ode_is_the_step_of_the_diffusers_scheduler(steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    for index, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(v, timestep, x).prev_sample
        coefficients = transition_coefficients("ode", scheduler.sigmas[index], scheduler.sigmas[index + 1])
        step = transition_step(v, x, coefficients, noise=None)
        torch.testing.assert_close(step.next_sample, expected, rtol=1e-6, atol=1e-6)
        assert step.log_prob is None
        x = expected


@SETTINGS
@given(sigmas, fractions, st.floats(0.0, 1.0))
def test_cps_keeps_image_and_noise_at_the_level_of_the_next_step(sigma: float, fraction: float, eta: float) -> None:
    sigma_next = sigma * fraction
    a, b, s = scalars(transition_coefficients("cps", *double(sigma, sigma_next), eta=eta))
    # x = (1−σ)·x₀ + σ·x₁ and v = x₁ − x₀, so these are the factors of x₀ and x₁ in the next sample.
    image, noise = a * (1 - sigma) - b, a * sigma + b
    assert image == pytest.approx(1 - sigma_next, abs=1e-9)
    assert noise**2 + s**2 == pytest.approx(sigma_next**2, abs=1e-9)


@SETTINGS
@given(st.floats(0.001, 0.98), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_ddim_keeps_image_and_noise_at_the_level_of_the_next_step(now: float, share: float, eta: float) -> None:
    after = now + share * (1 - now)
    a, b, s = scalars(transition_coefficients("ddim", *double(now, after), eta=eta))
    image, noise = a * math.sqrt(now), a * math.sqrt(1 - now) + b
    assert image == pytest.approx(math.sqrt(after), abs=1e-9)
    assert noise**2 + s**2 == pytest.approx(1 - after, abs=1e-9)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
@pytest.mark.parametrize("sigma", [0.9, 0.5, 0.2])
def test_an_sde_keeps_the_noise_level_to_first_order_in_the_step(kind: str, sigma: float) -> None:
    """The score correction balances the added noise up to second order, so half the step quarters the error."""

    def error(step: float) -> float:
        a, b, s = scalars(transition_coefficients(kind, *double(sigma, sigma - step), eta=0.7))
        # For an image at 0, x = σ·x₁ and v = x₁.
        return abs((a * sigma + b) ** 2 + s**2 - (sigma - step) ** 2)

    assert error(0.005) < 0.26 * error(0.01) < 0.26 * 0.26 * error(0.02) * 1.05


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_no_noise_level_is_the_ode(kind: str) -> None:
    a, b, s = scalars(transition_coefficients(kind, *double(0.6, 0.4), eta=0.0))
    assert (a, b, s) == pytest.approx((1.0, -0.2, 0.0), abs=1e-12)


def test_flow_sde_at_one_takes_the_second_level_of_the_schedule() -> None:
    at_one = transition_coefficients("flow_sde", 1.0, 0.9, eta=0.7, sigma_max=0.9)
    assert at_one.noise_rate is not None
    assert at_one.noise_rate.item() == pytest.approx(0.7 * math.sqrt(1 / 0.1), rel=1e-6)
    below = transition_coefficients("flow_sde", 0.8, 0.6, eta=0.7, sigma_max=0.9)
    assert torch.equal(below.std, transition_coefficients("flow_sde", 0.8, 0.6, eta=0.7).std)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps", "ode", "ddim"])
def test_float32_coefficients_are_the_float64_ones_rounded_once(kind: str) -> None:
    sigma = torch.tensor([0.9999, 0.7, 0.3, 0.011])
    sigma_next = torch.tensor([0.99985, 0.6999, 0.2, 0.01])
    if kind == "ddim":
        sigma, sigma_next = sigma_next, sigma
    single = transition_coefficients(kind, sigma, sigma_next, eta=0.6)
    exact = transition_coefficients(kind, sigma.double(), sigma_next.double(), eta=0.6)
    for name in ("sample_drift", "velocity_scale", "std", "noise_rate"):
        got, wanted = getattr(single, name), getattr(exact, name)
        if wanted is None:
            assert got is None
            continue
        assert got.dtype == torch.float32 and wanted.dtype == torch.float64
        assert torch.equal(got, wanted.float()), name


def test_numbers_zero_dimensional_and_one_dimensional_levels_agree() -> None:
    rows = transition_coefficients("flow_sde", torch.full((3,), 0.75), torch.full((3,), 0.5))
    single = transition_coefficients("flow_sde", 0.75, 0.5)
    mixed = transition_coefficients("flow_sde", torch.full((3,), 0.75), torch.tensor(0.5))
    assert rows.std.shape == mixed.std.shape == (3,) and single.std.shape == (1,)
    assert torch.equal(rows.std, mixed.std) and torch.equal(rows.std, single.std.expand(3))


@pytest.mark.parametrize(
    "rows", [slice(2, 4), slice(-1, None), torch.tensor([3, 0, 3]), torch.tensor([False, True, False, True])]
)
def test_a_micro_batch_takes_its_rows_of_the_coefficients_and_a_single_row_whole(rows: slice | torch.Tensor) -> None:
    case = make_case(batch=4)
    micro = {
        name: value[rows] if isinstance(value, torch.Tensor) and value.dim() else value for name, value in case.items()
    }
    losses = []
    for levels in (0.75, torch.full((4,), 0.75)):
        coefficients = transition_coefficients("flow_sde", levels, 0.5)
        losses.append(policy_loss(**(micro | {"coefficients": coefficients[rows]})).loss)
    assert losses[0].isfinite() and torch.equal(*losses)


def test_coefficients_are_equal_to_themselves_alone() -> None:
    first, second = (transition_coefficients("flow_sde", torch.tensor([0.7, 0.6]), 0.5) for _ in range(2))
    assert first == first and first != second


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    sigma, sigma_next = torch.tensor([1.0, 0.8, 0.33, 0.1]), torch.tensor([0.8, 0.33, 0.1, 0.0])
    for kind in ("flow_sde", "dance_sde"):
        rows = transition_coefficients(kind, sigma, sigma_next, sigma_max=0.8)
        for index in range(4):
            alone = transition_coefficients(kind, sigma[index], sigma_next[index], sigma_max=0.8)
            for name in ("sample_scale", "velocity_scale", "std", "noise_rate"):
                assert torch.equal(getattr(alone, name)[0], getattr(rows, name)[index])


@pytest.mark.parametrize(
    ("kind", "levels", "eta", "stochastic"),
    [
        ("flow_sde", (0.5, 0.0), 0.7, True),
        ("flow_sde", (0.5, 0.2), 0.0, False),
        ("dance_sde", (0.5, 0.2), 0.3, True),
        ("cps", (0.5, 0.2), 0.7, True),
        ("cps", (0.5, 0.0), 0.7, False),
        ("cps", (0.5, 0.2), 0.0, False),
        ("ode", (0.5, 0.2), 0.7, False),
        ("ddim", (0.5, 0.9), 1.0, True),
        ("ddim", (0.5, 1.0), 1.0, False),
        ("ddim", (0.5, 0.9), 0.0, False),
    ],
)
def test_stochastic_says_whether_the_step_has_noise(
    kind: str, levels: tuple[float, float], eta: float, stochastic: bool
) -> None:
    coefficients = transition_coefficients(kind, *levels, eta=eta)
    assert coefficients.stochastic is stochastic
    assert bool((coefficients.std > 0).all()) is stochastic


@pytest.mark.parametrize(
    ("error", "name", "kind", "levels", "options"),
    [
        (ValueError, "kind", "euler", (0.5, 0.2), {}),
        (ValueError, "kind", None, (0.5, 0.2), {}),
        (TypeError, "sigma", "ode", ("0.5", 0.2), {}),
        (TypeError, "sigma_next", "ode", (0.5, None), {}),
        (ValueError, "sigma", "ode", (float("nan"), 0.2), {}),
        (ValueError, "sigma", "ode", (1.5, 0.2), {}),
        (ValueError, "sigma", "ode", (torch.tensor([0.5, 1.5]), 0.2), {}),
        (ValueError, "sigma", "ode", (torch.tensor([0.5, float("nan")]), 0.2), {}),
        (ValueError, "sigma", "ode", (0.0, 0.0), {}),
        (ValueError, "sigma", "ode", (torch.rand(2, 1), 0.2), {}),
        (ValueError, "sigma", "ode", (torch.rand(0), 0.2), {}),
        (TypeError, "sigma", "ode", (torch.tensor([1, 1]), 0.2), {}),
        (ValueError, "sigma_next", "ode", (torch.full((2,), 0.5), torch.full((3,), 0.2)), {}),
        (ValueError, "sigma_next", "ode", (torch.full((2,), 0.5), torch.rand(2, device="meta")), {}),
        (ValueError, "sigma_next", "flow_sde", (0.5, 0.5), {}),
        (ValueError, "sigma_next", "flow_sde", (0.5, torch.tensor([0.2, 0.6])), {}),
        (ValueError, "sigma_next", "flow_sde", (0.5, -0.1), {}),
        (ValueError, "sigma_max", "flow_sde", (1.0, 0.9), {}),
        (ValueError, "sigma_max", "flow_sde", (1.0, 0.9), {"sigma_max": 1.0}),
        (ValueError, "sigma_max", "flow_sde", (torch.ones(2), 0.9), {"sigma_max": torch.rand(3)}),
        (TypeError, "sigma_max", "flow_sde", (1.0, 0.9), {"sigma_max": "0.9"}),
        (ValueError, "eta", "flow_sde", (0.5, 0.2), {"eta": -0.1}),
        (ValueError, "eta", "flow_sde", (0.5, 0.2), {"eta": float("inf")}),
        (TypeError, "eta", "flow_sde", (0.5, 0.2), {"eta": "0.7"}),
        (TypeError, "eta", "flow_sde", (0.5, 0.2), {"eta": torch.tensor(1)}),
        (ValueError, "eta", "flow_sde", (0.5, 0.2), {"eta": torch.tensor([0.7, -0.1])}),
        (ValueError, "eta", "flow_sde", (0.5, 0.2), {"eta": torch.tensor([0.7, float("nan")])}),
        (ValueError, "eta", "flow_sde", (torch.full((3,), 0.5), 0.2), {"eta": torch.tensor([0.7, 0.1])}),
        (ValueError, "eta", "cps", (0.5, 0.2), {"eta": torch.tensor([0.7, 1.1])}),
        (ValueError, "eta", "cps", (0.5, 0.2), {"eta": 1.1}),
        (ValueError, "eta", "ddim", (0.5, 0.9), {"eta": 1.1}),
        (ValueError, "sigma", "ddim", (0.0, 0.9), {}),
        (ValueError, "sigma", "ddim", (1.0, 1.0), {}),
        (ValueError, "sigma_next", "ddim", (0.5, 0.4), {}),
        (ValueError, "sigma_next", "cps", (0.5, torch.tensor([0.2, 0.0])), {}),
    ],
)
def test_bad_input_names_the_argument(
    error: type[Exception], name: str, kind: str, levels: tuple, options: dict
) -> None:
    with pytest.raises(error, match=rf"^{name}: expected .*got"):
        transition_coefficients(kind, *levels, **options)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps", "ddim"])
def test_each_row_may_have_its_own_amount_of_noise(kind: str) -> None:
    etas = torch.tensor([0.2, 1.0, 0.7])
    levels = (0.4, 0.7) if kind == "ddim" else (0.7, 0.4)
    together = transition_coefficients(kind, *levels, eta=etas)
    assert together.std.shape == (3,)
    for row, eta in enumerate(etas.tolist()):
        alone = transition_coefficients(kind, *levels, eta=eta)
        for name in ("sample_drift", "velocity_scale", "std"):
            torch.testing.assert_close(getattr(together, name)[row : row + 1], getattr(alone, name), rtol=1e-6, atol=0)


def test_levels_on_another_device_are_not_read() -> None:
    """A check of values would wait for a GPU; meta tensors, which have no values, stand in for it here."""
    coefficients = transition_coefficients("flow_sde", torch.rand(3, device="meta"), 0.1, sigma_max=0.9)
    assert coefficients.stochastic and coefficients.std.device.type == "meta" and coefficients.std.shape == (3,)


def test_coefficients_can_be_made_inside_a_compiled_function() -> None:
    def step(v: torch.Tensor, x: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, after: torch.Tensor):
        coefficients = transition_coefficients("flow_sde", sigma, after, eta=0.5, sigma_max=0.9)
        return transition_step(v, x, coefficients, noise=noise).next_sample

    v, x, noise = torch.randn(3, 2, 4, 3, 5).unbind()
    levels = torch.tensor([1.0, 0.7]), torch.tensor([0.9, 0.5])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v, x, noise, *levels), step(v, x, noise, *levels))
