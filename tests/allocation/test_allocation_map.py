"""Properties of the allocation map (docs/method.md, sections 4 and 6) in every implementation that runs on this CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import star_kernels as sk
from star_kernels.allocation import reference

BACKENDS = ["reference", *(["cpu"] if sk.available_backends()["cpu"] is None else [])]
backends = pytest.mark.parametrize("backend", BACKENDS)
property_settings = settings(max_examples=30, deadline=None, derandomize=True)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"combine": "max"},
    {"sharpness": 2.5},
    {"sharpness": 0.0},
    {"smooth": True},
    {"strength": 0.3},
    {"clamp": (0.5, 1.5)},
    {"clamp": (0.25, math.inf)},
    {"combine": "max", "sharpness": 0.5, "smooth": True, "strength": 0.8, "clamp": (0.2, 3.0)},
]
options = st.fixed_dictionaries(
    {},
    optional={
        "combine": st.sampled_from(["mean", "max"]),
        "sharpness": st.sampled_from([0.0, 0.5, 1.0, 2.0, 40.0]),
        "smooth": st.booleans(),
        "strength": st.sampled_from([0.0, 0.1, 0.75, 1.0]),
        "clamp": st.sampled_from([None, (0.0, 1.0), (0.5, 2.0), (1.0, math.inf)]),
    },
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, int], torch.Tensor | None]:
    """Mass [B, h·w, K] from flat to a single peak, with units that have none; the grid; a mask or None."""
    batch, height, width, units = (draw(st.integers(1, high)) for high in (3, 9, 9, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mass = torch.rand(batch, height * width, units, generator=generator)
    mass = mass ** draw(st.sampled_from([0, 1, 30])) * draw(st.sampled_from([1e-20, 1.0, 1e20]))
    mass = mass * (torch.rand(batch, 1, units, generator=generator) > draw(st.sampled_from([0.0, 0.5, 1.0])))
    mask = torch.rand(batch, height, width, generator=generator) > 0.4 if draw(st.booleans()) else None
    return mass, (height, width), mask


def random_mass(batch: int, positions: int, units: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(batch, positions, units, generator=torch.Generator().manual_seed(0)).to(dtype)


def valid_means(weights: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over valid positions of the samples that have any."""
    mask = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask
    counts = mask.sum((1, 2))
    return (weights.double().sum((1, 2)) / counts)[counts > 0]


@backends
@property_settings
@given(problem=problems(), kwargs=options)
def test_weights_are_not_negative_and_have_mean_one(backend, problem, kwargs):
    mass, grid, mask = problem
    weights = sk.allocation_map(mass, grid, mask=mask, backend=backend, **kwargs)
    assert weights.shape == (len(mass), *grid) and weights.dtype == torch.float32
    assert (weights >= 0).all()
    means = valid_means(weights, mask)
    torch.testing.assert_close(means, torch.ones_like(means), rtol=0, atol=1e-6)


@backends
@property_settings
@given(problem=problems(), kwargs=options)
def test_zero_strength_gives_exactly_one(backend, problem, kwargs):
    mass, grid, mask = problem
    weights = sk.allocation_map(mass, grid, mask=mask, backend=backend, **{**kwargs, "strength": 0.0})
    assert (weights == (1.0 if mask is None else mask.float())).all()


@backends
@property_settings
@given(problem=problems(), kwargs=options)
def test_no_units_left_gives_exactly_one(backend, problem, kwargs):
    mass, grid, mask = problem
    weights = sk.allocation_map(torch.zeros_like(mass), grid, mask=mask, backend=backend, **kwargs)
    assert (weights == (1.0 if mask is None else mask.float())).all()


@backends
@property_settings
@given(problem=problems(), kwargs=options, order=st.randoms(use_true_random=False))
def test_the_order_of_units_does_not_matter(backend, problem, kwargs, order):
    mass, grid, mask = problem
    permutation = list(range(mass.shape[2]))
    order.shuffle(permutation)
    weights = sk.allocation_map(mass, grid, mask=mask, backend=backend, **kwargs)
    permuted = sk.allocation_map(mass[:, :, permutation], grid, mask=mask, backend=backend, **kwargs)
    torch.testing.assert_close(permuted, weights, rtol=1e-6, atol=1e-30)


@backends
@property_settings
@given(problem=problems(), kwargs=options)
def test_a_sample_does_not_depend_on_the_batch(backend, problem, kwargs):
    mass, grid, mask = problem
    together = sk.allocation_map(mass, grid, mask=mask, backend=backend, **kwargs)
    for b in range(len(mass)):
        one_mask = None if mask is None else mask[b : b + 1]
        alone = sk.allocation_map(mass[b : b + 1], grid, mask=one_mask, backend=backend, **kwargs)
        assert torch.equal(alone[0], together[b])


@backends
def test_a_large_sample_does_not_depend_on_the_batch_or_the_number_of_threads(backend):
    mass = random_mass(3, 64 * 48, 7)
    kwargs: dict[str, Any] = {"sharpness": 1.7, "smooth": True, "backend": backend}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = sk.allocation_map(mass, (64, 48), **kwargs)
        torch.set_num_threads(1)
        alone = torch.cat([sk.allocation_map(mass[b : b + 1], (64, 48), **kwargs) for b in range(3)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@backends
@property_settings
@given(problem=problems(), kwargs=options)
def test_agrees_with_the_reference_in_float64(backend, problem, kwargs):
    mass, grid, mask = problem
    weights = sk.allocation_map(mass, grid, mask=mask, backend=backend, **kwargs)
    expected = reference.allocation_map(mass.double(), grid, mask=mask, **kwargs)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-30)


@backends
@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_agrees_with_the_reference_in_float64(backend, dtype, kwargs):
    mass = random_mass(2, 35, 3, dtype)
    mass[0, :, 1] = 0
    weights = sk.allocation_map(mass, (7, 5), backend=backend, **kwargs)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference.allocation_map(mass.double(), (7, 5), **kwargs)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)


@backends
def test_combine_averages_or_takes_the_maximum_of_units_scaled_to_mean_one(backend):
    mass = torch.tensor([[[4.0, 1.0], [0.0, 3.0]]])  # scaled to mean one: (2, 0) and (0.5, 1.5)
    mean = sk.allocation_map(mass, (1, 2), backend=backend)
    torch.testing.assert_close(mean, torch.tensor([[[1.25, 0.75]]]))
    highest = sk.allocation_map(mass, (1, 2), combine="max", backend=backend)
    torch.testing.assert_close(highest, torch.tensor([[[2.0, 1.5]]]) / 1.75)


@backends
def test_sharpness_is_a_power_and_strength_mixes_with_the_uniform_map(backend):
    mass = torch.tensor([[[1.0], [3.0]]])
    sharp = sk.allocation_map(mass, (2, 1), sharpness=2.0, backend=backend)
    torch.testing.assert_close(sharp, torch.tensor([[[0.2], [1.8]]]))
    half = sk.allocation_map(mass, (2, 1), strength=0.5, backend=backend)
    torch.testing.assert_close(half, torch.tensor([[[0.75], [1.25]]]))


@backends
def test_a_great_sharpness_leaves_the_peak_and_does_not_overflow(backend):
    mass = torch.tensor([[[1.0], [2.0], [1e30], [3.0]]])
    weights = sk.allocation_map(mass, (2, 2), sharpness=1e4, backend=backend)
    assert torch.equal(weights, torch.tensor([[[0.0, 0.0], [4.0, 0.0]]]))


@backends
def test_clamp_cuts_before_the_normalisation(backend):
    mass = torch.tensor([[[7.0], [1.0], [0.0], [0.0]]])  # weights 3.5, 0.5, 0, 0; clamped 2, 0.5, 0.25, 0.25
    weights = sk.allocation_map(mass, (1, 4), clamp=(0.25, 2.0), backend=backend)
    torch.testing.assert_close(weights, torch.tensor([[[2.0, 0.5, 0.25, 0.25]]]) / 0.75)


@backends
def test_a_clamped_map_spreads_no_wider_than_the_clamp(backend):
    weights = sk.allocation_map(random_mass(3, 64, 2) ** 8, (8, 8), clamp=(0.5, 2.0), backend=backend)
    assert (weights.amax((1, 2)) / weights.amin((1, 2)) <= 4 * (1 + 1e-6)).all()


@backends
def test_smoothing_spreads_a_peak_binomially_and_makes_up_for_the_border(backend):
    mass = torch.zeros(2, 16, 1)
    mass[0, 5] = 1  # row 1, column 1: its neighbours at the border have 12 of 16 parts inside the grid, the corner 9
    mass[1] = 1
    weights = sk.allocation_map(mass, (4, 4), smooth=True, backend=backend)
    spread = torch.zeros(4, 4)
    spread[:3, :3] = torch.tensor([[1 / 9, 2 / 12, 1 / 12], [2 / 12, 4 / 16, 2 / 16], [1 / 12, 2 / 16, 1 / 16]])
    torch.testing.assert_close(weights[0], spread / spread.mean())
    assert (weights[1] == 1).all()


@backends
def test_smoothing_does_not_mix_in_invalid_positions(backend):
    mass = torch.tensor([[[1.0], [100.0], [2.0]]])
    mask = torch.tensor([[[True, False, True]]])
    weights = sk.allocation_map(mass, (1, 3), smooth=True, mask=mask, backend=backend)
    torch.testing.assert_close(weights, torch.tensor([[[2 / 3, 0.0, 4 / 3]]]))


@backends
@pytest.mark.parametrize("combine", ["mean", "max"])
def test_a_unit_without_mass_drops_out(backend, combine):
    mass = random_mass(2, 12, 3)
    mass[:, :, 1] = 0
    weights = sk.allocation_map(mass, (3, 4), combine=combine, backend=backend)
    assert torch.equal(weights, sk.allocation_map(mass[:, :, [0, 2]], (3, 4), combine=combine, backend=backend))


@backends
def test_mass_at_invalid_positions_is_ignored_and_gets_no_weight(backend):
    mass, mask = random_mass(1, 6, 2), torch.tensor([[[True, True, False], [True, True, False]]])
    mass[:, [2, 5]] = math.nan
    weights = sk.allocation_map(mass, (2, 3), sharpness=2.0, mask=mask, backend=backend)
    cropped = sk.allocation_map(mass[:, [0, 1, 3, 4]], (2, 2), sharpness=2.0, backend=backend)
    torch.testing.assert_close(weights[:, :, :2], cropped)
    assert (weights[:, :, 2] == 0).all()


@backends
def test_a_unit_with_mass_at_invalid_positions_only_drops_out(backend):
    mass = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]])
    mask = torch.tensor([[[1, 1, 0]]])
    weights = sk.allocation_map(mass, (1, 3), mask=mask, backend=backend)
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 1.5, 0.0]]]))


@backends
def test_a_sample_without_valid_positions_has_no_weight(backend):
    mask = torch.tensor([[[False, False]], [[True, True]]])
    weights = sk.allocation_map(random_mass(2, 2, 1), (1, 2), mask=mask, backend=backend)
    assert (weights[0] == 0).all() and weights[1].mean() == 1


@backends
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_a_mask_may_be_of_any_dtype_that_holds_zero_and_one(backend, dtype):
    mask = torch.tensor([[[1, 0, 1, 1]]])
    weights = sk.allocation_map(random_mass(1, 4, 2), (2, 2), mask=mask.view(1, 2, 2).to(dtype), backend=backend)
    expected = sk.allocation_map(random_mass(1, 4, 2), (2, 2), mask=mask.view(1, 2, 2).bool(), backend=backend)
    assert torch.equal(weights, expected)


@backends
def test_tensors_that_are_not_contiguous_work(backend):
    mass, mask = random_mass(4, 12, 6), torch.rand(3, 4, 4) > 0.3
    view, mask_view = mass[::2, :, 1::2], mask.permute(1, 0, 2)[:2]
    weights = sk.allocation_map(view, (3, 4), mask=mask_view, backend=backend)
    assert torch.equal(
        weights, sk.allocation_map(view.contiguous(), (3, 4), mask=mask_view.contiguous(), backend=backend)
    )


@backends
def test_the_inputs_are_left_as_they_were_and_no_gradient_flows(backend):
    mass, mask = random_mass(2, 4, 2).requires_grad_(), torch.tensor([[[1.0, 0.0], [1.0, 1.0]]] * 2)
    copies = mass.detach().clone(), mask.clone()
    weights = sk.allocation_map(mass, (2, 2), sharpness=2.0, mask=mask, backend=backend)
    assert not weights.requires_grad
    assert torch.equal(mass, copies[0]) and torch.equal(mask, copies[1])


@backends
@pytest.mark.parametrize(("bad", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-0.5, "-0.5")])
def test_a_bad_value_of_the_mass_raises_and_is_located(backend, bad, shown):
    mass = random_mass(3, 6, 2)
    mass[1, 4, 1] = bad
    with pytest.raises(ValueError, match=rf"mass: .*got {shown} at sample 1, position 4, unit 1"):
        sk.allocation_map(mass, (2, 3), backend=backend)


@backends
@pytest.mark.parametrize("least", [5e-324, 1e-310, 1e-300, 1e307])
def test_a_mass_may_be_as_small_as_numbers_are_or_as_large_as_its_sum_allows(backend, least):
    mass = torch.full((1, 4, 1), least, dtype=torch.float64)
    mass[0, 0] = 0
    weights = sk.allocation_map(mass, (2, 2), backend=backend)
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.0, 4 / 3, 4 / 3, 4 / 3], dtype=torch.float64))


@backends
def test_a_sum_beyond_float64_raises_unless_it_is_masked(backend):
    mass = random_mass(2, 4, 2).double()
    mass[1, :2, 1] = 1.7e308
    with pytest.raises(ValueError, match=r"mass: .*got a sum of inf in sample 1"):
        sk.allocation_map(mass, (2, 2), backend=backend)
    mask = torch.tensor([[[True, False], [True, True]]] * 2)
    assert sk.allocation_map(mass, (2, 2), mask=mask, backend=backend).isfinite().all()


def test_without_the_check_of_the_cpu_a_bad_value_stays_visible():
    mass = random_mass(2, 6, 2)
    for bad in (math.nan, math.inf):
        mass[1, 4, 1] = bad
        weights = reference.allocation_map(mass, (2, 3), sharpness=2.0, smooth=True, clamp=(0.5, 2.0))
        assert weights[0].isfinite().all() and weights[1].isnan().all()


MASS = random_mass(2, 6, 3)
BAD_CALLS: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("mass", {"mass": [[1.0]]}, TypeError),
    ("mass", {"mass": MASS[0]}, ValueError),
    ("mass", {"mass": MASS.long()}, TypeError),
    ("mass", {"mass": MASS[:0]}, ValueError),
    ("mass", {"mass": MASS[:, :, :0]}, ValueError),
    ("mass", {"mass": MASS[:, :5]}, ValueError),
    ("mass", {"grid": (3, 3)}, ValueError),
    ("mass", {"mass": -MASS}, ValueError),
    ("grid", {"grid": 6}, TypeError),
    ("grid", {"grid": (6,)}, TypeError),
    ("grid", {"grid": (2.0, 3.0)}, TypeError),
    ("grid", {"grid": (-2, -3)}, ValueError),
    ("grid", {"grid": (0, 6)}, ValueError),
    ("combine", {"combine": "sum"}, ValueError),
    ("sharpness", {"sharpness": -1.0}, ValueError),
    ("sharpness", {"sharpness": math.nan}, ValueError),
    ("sharpness", {"sharpness": "2"}, TypeError),
    ("smooth", {"smooth": 1}, TypeError),
    ("strength", {"strength": 1.5}, ValueError),
    ("strength", {"strength": None}, TypeError),
    ("clamp", {"clamp": 2.0}, TypeError),
    ("clamp", {"clamp": (0.5, 1.0, 2.0)}, TypeError),
    ("clamp", {"clamp": (2.0, 3.0)}, ValueError),
    ("clamp", {"clamp": (0.1, 0.5)}, ValueError),
    ("clamp", {"clamp": (-1.0, 2.0)}, ValueError),
    ("clamp", {"clamp": (0.5, math.nan)}, ValueError),
    ("mask", {"mask": True}, TypeError),
    ("mask", {"mask": torch.ones(2, 6)}, ValueError),
    ("mask", {"mask": torch.ones(1, 2, 3)}, ValueError),
    ("mask", {"mask": torch.full((2, 2, 3), 0.5)}, ValueError),
    ("mask", {"mask": torch.ones(2, 2, 3, dtype=torch.complex64)}, TypeError),
    ("mask", {"mask": torch.ones(2, 2, 3, device="meta")}, ValueError),
    ("backend", {"backend": None}, TypeError),
    ("backend", {"backend": "gpu"}, ValueError),
]


@pytest.mark.parametrize(
    ("argument", "change", "error"), BAD_CALLS, ids=[f"{i}-{a}" for i, (a, _, _) in enumerate(BAD_CALLS)]
)
def test_a_bad_argument_raises_and_is_named(argument, change, error):
    call: dict[str, Any] = {"mass": MASS, "grid": (2, 3), **change}
    with pytest.raises(error, match=rf"^{argument}\b"):
        sk.allocation_map(call.pop("mass"), call.pop("grid"), **call)


@backends
def test_the_operator_passes_opcheck(backend):
    mass, mask = random_mass(2, 6, 3), torch.ones(2, 2, 3, dtype=torch.bool)
    operator = torch.ops.star_kernels.allocation_map.default
    torch.library.opcheck(operator, (mass, 2, 3, "mean", 1.0, False, 1.0, None, None, backend))
    torch.library.opcheck(operator, (mass.bfloat16(), 2, 3, "max", 2.0, True, 0.5, [0.5, 2.0], mask, backend))
    torch.library.opcheck(operator, (mass.double(), 2, 3, "mean", 1.0, True, 1.0, None, mask.float(), backend))


@backends
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic):
    def allocate(mass: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return 2 * sk.allocation_map(
            mass * 3, (2, 3), sharpness=2.0, smooth=True, clamp=(0.5, 2.0), mask=mask, backend=backend
        )

    torch.compiler.reset()  # the limit on recompilations counts those of other cases too
    compiled = torch.compile(allocate, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 4):
        mass = random_mass(batch, 6, 3).requires_grad_()
        for mask in (None, torch.ones(batch, 2, 3)):
            assert torch.equal(compiled(mass, mask), allocate(mass, mask))
