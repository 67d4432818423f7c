"""What capturing attention mass costs, against attention without it and against having it without a kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.attention_cases import make_inputs, members, sd35_medium


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["S", pytest.param("L", marks=pytest.mark.full)])
def test_joint_attention(measure: Callable[..., None], device: torch.device, shape: str, dtype: torch.dtype) -> None:
    case = sd35_medium(shape, batch=8 if device.type == "cuda" else 1)
    inputs = make_inputs(case, dtype, device)
    work = {"GFLOP": case.operations / 1e9}
    for name, function in members(inputs, backend="auto").items():
        group = f"attention, {case}, {str(dtype).removeprefix('torch.')}"
        measure(function, group=group, name=name, baseline=name == "SDPA, no capture", work=work)
