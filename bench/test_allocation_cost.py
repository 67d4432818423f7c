"""What the allocation map costs per denoising step: the C++ kernel against the eager definition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import star_kernels as sk

NAMES = {"reference": "reference, eager", "cpu": "C++ kernel"}
BACKENDS = [name for name in NAMES if sk.available_backends()[name] is None]
SIDES = {"S, 32x32 tokens": 32, "L, 64x64 tokens": 64}
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "sharp, smooth": {"sharpness": 2.0, "smooth": True}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SIDES)
def test_allocation_map(measure: Callable[..., None], shape: str, options: str, backend: str) -> None:
    side = SIDES[shape]
    mass = torch.rand(8, side * side, 8, generator=torch.Generator().manual_seed(0))
    function = functools.partial(sk.allocation_map, mass, (side, side), backend=backend, **OPTIONS[options])
    group = f"allocation_map, {shape}, {options}"
    measure(function, group=group, name=NAMES[backend], baseline=backend == "reference")
