"""The record that a kernel is launched and compiled from."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from star_kernels._kernel_calls import KernelCall  # noqa: E402

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


@triton.jit
def _double(source, target, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offsets, 2 * tl.load(source + offsets, mask=offsets < size), mask=offsets < size)


def double(source: torch.Tensor, target: torch.Tensor) -> KernelCall:
    size = source.numel()
    arguments = {"source": source, "target": target, "size": size, "BLOCK": 16}
    return KernelCall(
        "double", _double, (triton.cdiv(size, 16),), arguments, {"num_warps": 1, "enable_fp_fusion": True}
    )


@interpreted
def test_launch_runs_the_kernel_over_its_grid() -> None:
    source, target = torch.arange(37.0), torch.zeros(37)
    double(source, target).launch()
    assert torch.equal(target, 2 * source)


@interpreted
def test_compile_says_that_an_interpreted_kernel_cannot_be_compiled() -> None:
    call = double(torch.empty(37, device="meta"), torch.empty(37, device="meta"))
    with pytest.raises(RuntimeError, match="double: .*TRITON_INTERPRET"):
        call.compile("sm_90")
