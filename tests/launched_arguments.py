"""What Triton's launcher is given when an operator runs by a plan, against what Triton itself gives it.

Run by test_kernel_calls.py in a process of its own, on a driver that does nothing (bench/stub_driver.py).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench import stub_driver
from star_kernels import _kernel_calls
from star_kernels._kernel_calls import KernelCall, launch

Launched = list[Any]


def values(arguments: Any, known: dict[int, Any]) -> Iterator[Any]:
    """The numbers in `arguments`; pointers that are not `known` get names in the order of their use."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from values(argument, known)
        elif isinstance(argument, Tensor) or (isinstance(argument, int) and argument > 2**32):
            pointer = argument.data_ptr() if isinstance(argument, Tensor) else argument
            yield known.setdefault(pointer, f"temporary {len(known)}")
        else:
            yield argument


def launched(run: Callable[[], Any], inputs: list[Tensor]) -> Launched:
    """What the launcher was given while `run` ran: pointers into `inputs` as they are, others by name."""
    calls: list[Any] = []
    driver = triton.runtime.driver.active
    original = driver.launcher_cls.__call__

    def record(self: Any, *arguments: Any) -> None:
        calls.append(arguments)
        original(self, *arguments)

    driver.launcher_cls.__call__ = record
    try:
        outputs = run()
    finally:
        driver.launcher_cls.__call__ = original
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    known: dict[int, Any] = {out.data_ptr(): f"output {i}" for i, out in enumerate(outputs) if out is not None}
    for tensor in inputs:
        start = tensor.untyped_storage().data_ptr()
        known |= {start + i: start + i for i in range(tensor.untyped_storage().nbytes())}
    # Grid, stream, function and packed metadata, then without metadata and hooks the arguments.
    return [(call[:6], [*values(call[9:], known)]) for call in calls]


def compare(what: str, run: Callable[..., Any], tensors: dict[str, Tensor | None]) -> None:
    """`run(**tensors)` by Triton, and by its plan, which may have been made for other tensors."""
    given = [tensor for tensor in tensors.values() if tensor is not None]
    plans = _kernel_calls._plans
    _kernel_calls._plans = {}
    by_triton = launched(lambda: run(**tensors), given)
    _kernel_calls._plans = plans
    run(**tensors)
    by_plan = launched(lambda: run(**tensors), given)
    assert by_triton and by_triton == by_plan, f"{what}: Triton\n{by_triton}\nplan\n{by_plan}"


@triton.jit
def _kernel(pair, scratch, target, size, factor: tl.float64, BLOCK: tl.constexpr, KIND: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(pair[0][0] + offsets * pair[0][1], mask=offsets < size)
    right = tl.load(pair[1][0] + offsets * pair[1][1], mask=offsets < size)
    tl.store(scratch + offsets, left * factor, mask=offsets < size)
    tl.store(target + offsets, right, mask=offsets < size)


def prepare(left: Tensor, right: Tensor, factor: float) -> tuple[tuple[Tensor, None, Tensor], list[KernelCall]]:
    size = left.shape[0] - 1
    scratch, target = torch.empty(2, size, device=left.device), torch.empty(size, device=left.device)
    arguments = {
        "pair": ((left[1:], left.stride(0)), (right, tl.constexpr(right.stride(0)))),
        "scratch": scratch[1],
        "target": target,
        "size": size,
        "factor": factor,
        "BLOCK": 16,
        "KIND": tl.float32,
    }
    call = KernelCall("known", _kernel, (triton.cdiv(size, 16), 2), arguments, {"num_warps": 1})
    return (target, None, right), [call, call]


def known() -> None:
    memory = torch.arange(100.0)
    for start, step in itertools.product((0, 1, 3), (1, 2)):
        # Two inputs in one storage, one within the other.
        left, right = memory[start::step][:20], memory[::step][:19]
        compare("known", lambda left, right: launch(prepare, (left, right), (0.5,)), {"left": left, "right": right})


if __name__ == "__main__":
    stub_driver.activate(Path(sys.argv[1]))
    known()
