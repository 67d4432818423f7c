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

import star_kernels as sk
from bench import stub_driver
from star_kernels import _kernel_calls, backends
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


def compare(what: str, run: Callable[..., Any], tensors: dict[str, Tensor]) -> None:
    """`run(**tensors)` by Triton, and by a plan that was made for other tensors like them."""
    plans = _kernel_calls._plans
    _kernel_calls._plans = {}
    by_triton = launched(lambda: run(**tensors), [*tensors.values()])
    _kernel_calls._plans = plans
    run(**{name: like(tensor) for name, tensor in tensors.items()})
    known = len(plans)
    by_plan = launched(lambda: run(**tensors), [*tensors.values()])
    assert by_triton and by_triton == by_plan, f"{what}: Triton\n{by_triton}\nplan\n{by_plan}"
    assert len(plans) == known, f"{what}: tensors with the same metadata made another plan"


def like(tensor: Tensor) -> Tensor:
    """Other memory with the same strides and the same alignment."""
    spare = torch.zeros(tensor.untyped_storage().nbytes() + 64, dtype=torch.uint8)
    while spare.data_ptr() % 16 != (tensor.untyped_storage().data_ptr()) % 16:
        spare = spare[1:]
    whole = spare[: tensor.untyped_storage().nbytes()].view(tensor.dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), whole.storage_offset() + tensor.storage_offset()).copy_(
        tensor
    )


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


def shifted(tensor: Tensor) -> Tensor:
    """The same values where 16 does not divide the pointer."""
    flat = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.view(tensor.shape).copy_(tensor)


def operators() -> None:
    batch, shape, size, grid, units = 2, (2, 4, 4, 8), (2, 4, 8), (2, 4), 3
    last = torch.channels_last
    v, u, r, o = (torch.randn(shape).bfloat16() for _ in range(4))
    x, y = torch.randn(shape), torch.randn(shape)
    old, advantage, mask = torch.randn(size), torch.randn(batch), torch.ones(size, dtype=torch.bool)
    mass, weights = torch.rand(batch, 8, units), torch.rand(batch, *grid)
    rows = {name: torch.rand(batch) + 0.1 for name in ("sample_drift", "velocity_scale", "std")}
    query, key, value = (torch.randn(batch, 24, 2, 16).bfloat16().transpose(1, 2) for _ in range(3))
    unit_weights, log_sum_exp = torch.rand(batch, 8, units), torch.rand(batch, 2, 16)
    lengths = torch.tensor([5, 8])
    guided: dict[str, Any] = {"guidance_scale": 1.5, "backend": "triton"}

    def coefficients(given: dict[str, Any]) -> sk.TransitionCoefficients:
        return sk.TransitionCoefficients(*(given.pop(name) for name in rows))

    def step(**given: Any) -> Any:
        return sk.transition_step(coefficients=coefficients(given), backend="triton", **given)

    def log_prob(**given: Any) -> Any:
        return sk.transition_log_prob(coefficients=coefficients(given), **guided, **given)

    def loss(**given: Any) -> Any:
        options = {"granularity": "image"} if "mask" in given else {"objective": "guard"}
        return sk.policy_loss(coefficients=coefficients(given), **guided, **options, **given).loss

    def trained(**given: Any) -> Any:
        velocity = given.pop("velocity").detach().requires_grad_()
        return torch.autograd.grad(3 * loss(velocity=velocity, **given), velocity)

    def on_cpu(row: sk.TransitionCoefficients) -> Callable[..., Any]:
        return lambda **given: sk.transition_step(coefficients=row, backend="triton", **given)

    latents = {"velocity": v, "sample": x}
    in_loss = latents | rows | {"next_sample": y, "old_log_prob": old, "advantage": advantage, "weights": weights}
    in_loss |= {"unconditional_velocity": u, "reference_velocity": r}
    cases: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
        "map": (lambda mass: sk.allocation_map(mass, grid, backend="triton"), {"mass": mass}),
        "step": (step, latents | {"noise": y} | rows),
        "step, channels last": (step, {**latents, "velocity": v.to(memory_format=last), "noise": y} | rows),
        "step, row by value": (on_cpu(sk.transition_coefficients("cps", 0.8, 0.7)), latents | {"noise": y}),
        "log-prob": (log_prob, latents | {"next_sample": y, "unconditional_velocity": u} | rows),
        "loss": (loss, in_loss | {"old_velocity": o}),
        "loss of images": (loss, in_loss | {"mask": mask}),
        "loss and gradient": (trained, in_loss | {"old_velocity": o}),
        "mass": (
            lambda **given: sk.attention_mass(**given, backend="triton"),
            {
                "query": query[:, :, :16],
                "key": key[:, :, 16:],
                "unit_weights": unit_weights,
                "log_sum_exp": log_sum_exp,
            },
        ),
        "attention": (
            lambda **given: sk.joint_attention(**given, num_image_tokens=16, rows=(1, 2), backend="triton"),
            {"query": query, "key": key, "value": value, "unit_weights": unit_weights[1:], "text_lengths": lengths},
        ),
        "mass beside attention": (
            lambda **given: sk.joint_attention(
                **given, num_image_tokens=16, rows=(1, 2), implementation="sdpa", backend="triton"
            )[1],
            {"query": query, "key": key, "value": value, "unit_weights": unit_weights[1:]},
        ),
    }
    for name, (run, tensors) in cases.items():
        compare(name, run, tensors)
        compare(f"{name}, unaligned", run, {each: shifted(tensor) for each, tensor in tensors.items()})


if __name__ == "__main__":
    stub_driver.activate(Path(sys.argv[1]))
    triton.runtime.driver.active.get_current_stream = lambda device: 7
    backends._reason_against = lambda *_: None
    known()
    assert "torch._dynamo" not in sys.modules, "a launch imports PyTorch's compiler"
    operators()
