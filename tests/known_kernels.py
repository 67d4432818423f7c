"""Kernels whose machine code is known beforehand, so that the static report can be seen to find what it looks for.

Run by test_ahead_of_time.py in a process of its own: prints the reports of the architecture given as JSON.
"""

import dataclasses
import json
import sys

import torch
import triton
import triton.language as tl

from bench.static_gpu import report
from star_kernels._kernel_calls import ARCHITECTURES, KernelCall

WARPS, TILE = 4, 64


@triton.jit
def holds_more_than_the_registers(source, target, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    values = tl.load(source + offsets)
    tl.store(target + offsets, values - tl.sum(values))


@triton.jit
def multiplies_in_a_loop(left, right, target, outer, inner, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    for i in tl.range(0, outer, num_stages=1):
        accumulator = tl.zeros([TILE, TILE], dtype=tl.float32)
        for j in tl.range(0, inner, num_stages=1):
            tile = offsets + j * TILE * TILE
            accumulator = tl.dot(tl.load(left + tile), tl.load(right + tile), accumulator)
        tl.store(target + i * TILE * TILE + offsets, tl.exp2(accumulator))


def calls(architecture: str) -> list[KernelCall]:
    lanes = ARCHITECTURES[architecture][2]
    floats = torch.empty(1 << 16, device="meta")
    halves = torch.empty(1 << 16, device="meta", dtype=torch.bfloat16)
    options = {"num_stages": 1, "enable_fp_fusion": True}
    hungry = {"source": floats, "target": floats, "SIZE": 512 * lanes}
    loop = {"left": halves, "right": halves, "target": floats, "outer": 7, "inner": 7, "TILE": TILE}
    return [
        KernelCall("hungry", holds_more_than_the_registers, (1,), hungry, {"num_warps": 1, **options}),
        KernelCall("loop", multiplies_in_a_loop, (1,), loop, {"num_warps": WARPS, **options}),
    ]


if __name__ == "__main__":
    reports = [dataclasses.asdict(report("known", call, sys.argv[1])) for call in calls(sys.argv[1])]
    print(json.dumps({"triton": triton.__version__, "kernels": reports}))
