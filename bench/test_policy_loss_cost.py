"""What the policy loss and its gradient cost: the fused kernel against autograd, torch.compile and a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import latent_cases as cases

VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "velocity in bfloat16": {"velocity_dtype": torch.bfloat16},
    "image-level ratio": {"granularity": "image"},
    "image-level dppo": {"granularity": "image", "objective": "dppo"},
    "guard": {"objective": "guard"},
    "dppo": {"objective": "dppo"},
    "KL and guidance": {"kl_and_guidance": True},
    "channels last": {"memory_format": torch.channels_last},
}


@pytest.fixture(autouse=True)
def graphs_of_its_own() -> Iterator[None]:
    """torch.compile goes over to eager code when one function has been compiled for many shapes."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("variant", ["", *(pytest.param(v, marks=pytest.mark.full) for v in VARIANTS if v)])
@pytest.mark.parametrize("batch", [9, 64])
def test_policy_loss(measure: Callable[..., None], device: torch.device, batch: int, variant: str) -> None:
    case = cases.make_case(batch, 16, 64, device, **VARIANTS[variant])
    moved = cases.loss_bytes(case)
    members: dict[str, Callable[[], object]] = {
        "eager": cases.eager_loss(case),
        "torch.compile": cases.compiled_loss(case),
        "torch.compile, gradient written out": cases.compiled_loss_and_gradient(case),
        "fused": functools.partial(cases.loss_and_backward, case, "auto"),
        "copy of as many bytes": cases.copy(moved, device),
    }
    group = f"policy loss forward and backward, {case}" + (f", {variant}" if variant else "")
    for name, function in members.items():
        measure(function, group=group, name=name, baseline=name == "eager", work={"GB": moved / 1e9})
