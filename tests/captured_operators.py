"""Whether a graph of CUDA could capture the operators: no copy from or to the host, no wait for the device.

Run by test_kernel_calls.py in a process of its own. Tensors on the meta device stand for those on a GPU, on a driver
that does nothing (bench/stub_driver.py), and a dispatch mode looks at every operator of PyTorch that runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # is imported on first use, which must not come while the meta device stands for a GPU
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import star_kernels as sk
from bench import stub_driver
from star_kernels import backends


class Refuse(TorchDispatchMode):
    """Raises where numbers would cross between the host and the device; one that goes by value may."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.device.type == "meta" for tensor in tensors)
        on_cpu = any(tensor.device.type == "cpu" and tensor.dim() > 0 for tensor in tensors)
        reads = function is torch.ops.aten._local_scalar_dense.default
        if on_gpu and (on_cpu or reads or "copy" in function.name() and any(t.is_cpu for t in tensors)):
            raise RuntimeError(f"{function.name()} crosses between host and device")
        return result


def tensor(*arguments: Any, make: Callable[..., Tensor] = torch.tensor, **options: Any) -> Tensor:
    """torch.tensor, which on a GPU copies what it is given; the meta device does not show it."""
    if torch.device(options.get("device") or "cpu").type == "meta":
        raise RuntimeError("torch.tensor crosses from the host to the device")
    return make(*arguments, **options)


def gpu(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def operators() -> dict[str, Callable[[], Any]]:
    batch, shape, size = 2, (2, 4, 8, 8), (2, 8, 8)
    latents = {name: gpu(*shape, dtype=torch.bfloat16) for name in ("unconditional_velocity", "reference_velocity")}
    velocity, x, y = gpu(*shape, dtype=torch.bfloat16, grad=True), gpu(*shape), gpu(*shape)
    old, advantage, one = gpu(*size), gpu(batch), gpu()
    query, key, value = (gpu(batch, 24, 2, 16, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    units, sums = gpu(batch, 8, 3), gpu(batch, 2, 24)
    images, texts = slice(0, 16), slice(16, None)

    def of(row: sk.TransitionCoefficients, name: str) -> dict[str, Callable[[], Any]]:
        def loss(**options: Any) -> Tensor:
            options = {**latents, "guidance_scale": 1.5, "kl_weight": 0.1, **options}
            return sk.policy_loss(velocity, x, y, old, advantage, row, weights=gpu(batch, 4, 4), **options).loss

        def backward(**options: Any) -> Any:
            return torch.autograd.grad(loss(**options), velocity, one)

        def step_and_backward() -> Any:
            drawn = sk.transition_step(velocity, x, row, noise=y).next_sample
            return torch.autograd.grad(drawn, velocity, x)

        def log_prob_and_backward() -> Any:
            return torch.autograd.grad(sk.transition_log_prob(velocity, x, y, row), velocity, old)

        calls = {
            "a step and its backward": step_and_backward,
            "a log-prob and its backward": log_prob_and_backward,
            "a loss and its backward": backward,
            "a loss with everything": lambda: backward(
                granularity="image", mask=gpu(*size, dtype=torch.bool), old_velocity=x, kl_scale="velocity"
            ),
        }
        return {f"{call}, {name}": run for call, run in calls.items()}

    each = sk.TransitionCoefficients(gpu(batch), gpu(batch), gpu(batch))
    return {
        **of(each, "rows on the GPU"),
        **of(sk.transition_coefficients("flow_sde", 0.8, 0.7), "one row on the CPU"),
        "a map": lambda: sk.allocation_map(gpu(batch, 16, 3), (4, 4), clamp=(0.5, 2.0), mask=gpu(batch, 4, 4) > 0),
        "mass": lambda: sk.attention_mass(query[:, :, images], key[:, :, texts], units, sums[:, :, images]),
        "mass with lengths": lambda: sk.attention_mass(
            query[:, :, images], key[:, :, texts], units, sums[:, :, images], text_lengths=gpu(batch).int()
        ),
        "attention": lambda: sk.joint_attention(query, key, value, num_image_tokens=16, implementation="fused"),
        "attention with capture": lambda: sk.joint_attention(
            query, key, value, units, num_image_tokens=16, rows=(0, batch), implementation="fused"
        ),
        "attention with lengths": lambda: sk.joint_attention(
            query, key, value, units, num_image_tokens=16, text_lengths=gpu(batch).int(), implementation="fused"
        ),
    }


if __name__ == "__main__":
    stub_driver.activate(Path(sys.argv[1]))
    backends._missing_triton = lambda: None
    Tensor.is_meta = property(lambda _: False)  # a kernel can read them
    torch._C._len_torch_dispatch_stack = lambda: 0  # the operators are not to know that somebody looks
    torch.tensor = tensor
    for name, run in operators().items():
        try:
            with Refuse():
                run()
                run()
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error}") from error
    known: list[Callable[[], Any]] = [
        lambda: torch.zeros(3).to("meta"),
        lambda: torch.zeros(()).to("meta"),
        lambda: gpu(3).copy_(torch.zeros(3)),
        lambda: gpu(3).cpu(),
        lambda: torch.tensor(1.0, device="meta"),
        lambda: gpu(1).item(),
        lambda: gpu(1).tolist(),
    ]
    for index, crosses in enumerate(known):
        with Refuse():
            try:
                crosses()
            except (RuntimeError, NotImplementedError):
                continue
        raise AssertionError(f"known[{index}] was not refused")
