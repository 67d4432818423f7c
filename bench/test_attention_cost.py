"""What capturing attention mass costs, against attention without it and against having it without a kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.attention_cases import Inputs, make_inputs, mass_members, members, sd35_medium


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["S", pytest.param("L", marks=pytest.mark.full)])
@pytest.mark.parametrize(("what", "compared"), [("attention", members), ("attention mass", mass_members)])
def test_attention(
    measure: Callable[..., None],
    device: torch.device,
    what: str,
    compared: Callable[[Inputs, str], dict[str, Callable[[], object]]],
    shape: str,
    dtype: torch.dtype,
) -> None:
    case = sd35_medium(shape, batch=8 if device.type == "cuda" else 1)
    inputs = make_inputs(case, dtype, device)
    group = f"{what}, {case}, {str(dtype).removeprefix('torch.')}"
    work = {"GFLOP": case.operations / 1e9} if compared is members else None
    for name, function in compared(inputs, "auto").items():
        measure(function, group=group, name=name, baseline=name == "SDPA, no capture", work=work)
