"""What the allocation map costs per denoising step: the fused kernel against the eager definition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import star_kernels as sk

SIDES = {"S": 32, "L": 64}
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "sharp, smooth": {"sharpness": 2.0, "smooth": True}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SIDES)
def test_allocation_map(measure: Callable[..., None], device: torch.device, shape: str, options: str) -> None:
    side = SIDES[shape]
    mass = torch.rand(8, side * side, 8, generator=torch.Generator().manual_seed(0)).to(device)
    call = functools.partial(sk.allocation_map, mass, (side, side), **OPTIONS[options])
    group = f"allocation map, {shape}, {side} x {side} tokens, B 8, K 8, {options}"
    measure(functools.partial(call, backend="reference"), group=group, name="eager", baseline=True)
    measure(functools.partial(call, backend="auto"), group=group, name="fused")
