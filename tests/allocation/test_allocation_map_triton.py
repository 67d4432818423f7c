"""The Triton kernel of the allocation map, interpreted where there is no GPU, against the reference in float64."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels as sk
from star_kernels.allocation import reference

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERYTHING: dict[str, Any] = {
    "combine": "max",
    "sharpness": 1.7,
    "smooth": True,
    "strength": 0.8,
    "clamp": (0.2, 3.0),
}


def random_mass(batch: int, positions: int, units: int, dtype: torch.dtype = torch.float32) -> Tensor:
    mass = torch.rand(batch, positions, units, generator=torch.Generator().manual_seed(0)) ** 4
    return mass.to(DEVICE, dtype)


def random_mask(batch: int, height: int, width: int) -> Tensor:
    return (torch.rand(batch, height, width, generator=torch.Generator().manual_seed(1)) > 0.4).to(DEVICE)


def assert_agrees(mass: Tensor, grid: tuple[int, int], mask: Tensor | None = None, **options: Any) -> Tensor:
    weights = sk.allocation_map(mass, grid, mask=mask, backend="triton", **options)
    expected = reference.allocation_map(mass.double(), grid, mask=mask, **options)
    assert weights.dtype == (torch.float64 if mass.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-30)
    return weights


@pytest.mark.parametrize(
    ("options", "grid", "units", "dtype", "masked"),
    [
        ({}, (7, 5), 3, torch.float32, False),
        ({}, (1, 1), 1, torch.bfloat16, False),
        ({"combine": "max"}, (3, 5), 17, torch.float16, True),
        ({"sharpness": 2.5}, (4, 4), 1, torch.bfloat16, True),
        ({"sharpness": 0.0}, (3, 5), 2, torch.float32, True),
        ({"sharpness": 40.0}, (9, 3), 4, torch.float32, False),
        ({"smooth": True}, (5, 7), 3, torch.float64, True),
        ({"smooth": True}, (1, 6), 2, torch.float32, False),
        ({"strength": 0.3}, (6, 1), 5, torch.float16, False),
        ({"clamp": (0.5, 1.5)}, (4, 6), 3, torch.float32, True),
        ({"clamp": (0.25, math.inf)}, (4, 6), 3, torch.float64, False),
        (EVERYTHING, (7, 5), 16, torch.float32, True),
    ],
    ids=str,
)
def test_agrees_with_the_reference_in_float64(
    options: dict[str, Any], grid: tuple[int, int], units: int, dtype: torch.dtype, masked: bool
) -> None:
    mass = random_mass(2, grid[0] * grid[1], units, dtype)
    if units > 1:
        mass[0, :, 1] = 0
        mass[1, 1] = 0
    assert_agrees(mass, grid, random_mask(2, *grid) if masked else None, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_of_several_tiles_agrees_and_has_mean_one(masked: bool) -> None:
    grid = (61, 67)
    mask = random_mask(1, *grid) if masked else None
    weights = assert_agrees(random_mass(1, 61 * 67, 3), grid, mask, **EVERYTHING)
    assert weights.double().sum().item() == pytest.approx(61 * 67 if mask is None else mask.sum().item(), rel=1e-7)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_only_proportions_count(scale: float) -> None:
    mass = random_mass(1, 12, 2)
    mass[:, :, 1] *= scale
    assert_agrees(mass, (3, 4), sharpness=3.0)


def test_a_great_sharpness_leaves_the_peak() -> None:
    mass = torch.tensor([[[1.0], [2.0], [1e30], [3.0]]], device=DEVICE)
    weights = sk.allocation_map(mass, (2, 2), sharpness=1e4, backend="triton")
    assert weights.tolist() == [[[0.0, 0.0], [4.0, 0.0]]]
    behind = torch.full((1, 61 * 67, 1), 1e-30, device=DEVICE)
    behind[0, 0] = 1.0  # in the first of several tiles
    assert sk.allocation_map(behind, (61, 67), sharpness=1e4, backend="triton")[0, 0, 0] == 61 * 67
    peaks = sk.allocation_map(torch.ones_like(mass), (2, 2), sharpness=1e4, backend="triton")
    assert (peaks == 1).all()


def test_no_effect_and_no_units_give_exactly_one_and_an_empty_sample_zero() -> None:
    mass, mask = random_mass(3, 15, 2), random_mask(3, 3, 5)
    mass[0] = 0
    mask[2] = False
    weights = sk.allocation_map(mass, (3, 5), mask=mask, backend="triton", **EVERYTHING)
    assert torch.equal(weights[0], mask[0].float()) and not weights[2].any()
    uniform = sk.allocation_map(mass, (3, 5), mask=mask, backend="triton", **EVERYTHING | {"strength": 0.0})
    assert torch.equal(uniform, mask.float())


def test_a_sample_does_not_depend_on_the_batch() -> None:
    mass, mask = random_mass(3, 35, 4), random_mask(3, 7, 5)
    together = sk.allocation_map(mass, (7, 5), mask=mask, backend="triton", **EVERYTHING)
    alone = sk.allocation_map(mass[1:2], (7, 5), mask=mask[1:2], backend="triton", **EVERYTHING)
    assert torch.equal(alone[0], together[1])


def test_tensors_that_are_not_contiguous_work() -> None:
    mass, mask = random_mass(4, 12, 6)[::2, :, 1::2], random_mask(3, 4, 4).permute(1, 0, 2)[:2]
    weights = sk.allocation_map(mass, (3, 4), mask=mask, backend="triton")
    assert torch.equal(weights, sk.allocation_map(mass.contiguous(), (3, 4), mask=mask.contiguous(), backend="triton"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=str)
def test_a_mass_that_is_not_finite_makes_nan_of_its_sample_only(bad: float, options: dict[str, Any]) -> None:
    """The kernel itself: for tensors on the CPU the operator raises before it is called."""
    kernels = importlib.import_module("star_kernels.allocation.triton_kernels")
    mass, mask = random_mass(2, 15, 3), torch.ones(2, 3, 5, dtype=torch.bool, device=DEVICE)
    mask[0, 0, 0] = False
    mass[0, 0, 1] = mass[1, 7, 2] = bad
    defaults = {"combine": "mean", "sharpness": 1.0, "smooth": False, "strength": 1.0, "clamp": None}
    weights = kernels.allocation_map(mass, (3, 5), mask=mask, **defaults | options)
    assert weights[0].isfinite().all() and weights[1].isnan().all()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU values are not looked at")
def test_a_bad_value_of_the_mass_raises_on_the_cpu() -> None:
    mass = random_mass(2, 6, 2)
    mass[1, 4, 1] = -0.5
    with pytest.raises(ValueError, match=r"mass: .*got -0.5 at sample 1, position 4, unit 1"):
        sk.allocation_map(mass, (2, 3), backend="triton")


def test_opcheck() -> None:
    mass, mask = random_mass(2, 6, 3), torch.ones(2, 2, 3, device=DEVICE)
    operator = torch.ops.star_kernels.allocation_map.default
    torch.library.opcheck(operator, (mass.bfloat16(), 2, 3, "max", 2.0, True, 0.5, [0.5, 2.0], mask, "triton"))


def test_triton_kernels_on_the_cpu_are_refused_unless_they_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="^backend='triton' cannot run allocation_map: its tensors are on the CPU"):
        sk.allocation_map(torch.ones(1, 4, 2), (2, 2), backend="triton")
