"""What a transition and its log-prob cost: the fused kernels against the eager definition, torch.compile and a copy."""

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
    "guidance": {"kl_and_guidance": True},
    "channels last": {"memory_format": torch.channels_last},
}


@pytest.fixture(autouse=True)
def no_gradients_and_graphs_of_its_own() -> Iterator[None]:
    """As in a rollout; and torch.compile goes over to eager code when one function has been compiled often."""
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("variant", ["", *(pytest.param(v, marks=pytest.mark.full) for v in VARIANTS if v)])
@pytest.mark.parametrize("batch", [9, 64])
def test_transition(measure: Callable[..., None], device: torch.device, batch: int, variant: str) -> None:
    case = cases.make_case(batch, 16, 64, device, **VARIANTS[variant])
    suffix = f", {variant}" if variant else ""
    step: dict[str, Callable[[], object]] = {
        "eager": cases.eager_step(case),
        "torch.compile": cases.compiled_step(case),
        "fused": functools.partial(cases.step, case, "auto"),
    }
    log_prob: dict[str, Callable[[], object]] = {
        "eager": cases.eager_log_prob(case),
        "torch.compile": cases.compiled_log_prob(case),
        "fused": functools.partial(cases.log_prob, case, "auto"),
    }
    for what, members, moved in (
        ("transition step", step, cases.step_bytes(case)),
        ("transition log-prob", log_prob, cases.log_prob_bytes(case)),
    ):
        members["copy of as many bytes"] = cases.copy(moved, device)
        for name, function in members.items():
            group = f"{what}, {case}{suffix}"
            measure(function, group=group, name=name, baseline=name == "eager", work={"GB": moved / 1e9})
