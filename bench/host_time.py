"""How long the host is busy with one call of an operator on a GPU; no GPU is needed.

``python -m bench.host_time`` prints microseconds per call, median over rounds, with the Triton that Python finds.
PYTHONPATH=.venv/triton-3.6 in front measures the oldest supported one. It is the processor's time of the calling
thread, so that what else runs on the machine hardly counts; the last row, an empty autograd function forward and
backward, says how fast the machine is at this.

The tensors are on PyTorch's meta device and take the operators' path for a GPU: argument checks, autograd, allocation
of the results, the plan of the launches, and Triton's own launcher, whose C code reads and packs the arguments for a
driver library that does nothing (`bench.stub_driver`). Left out is what needs a GPU:

- the driver's launch, two to three microseconds for each kernel;
- the caching allocator in place of the meta device's empty tensors, and asking PyTorch for the current device and
  stream, under a microsecond each;
- handing a backward pass to the autograd thread of the device and back: it runs in the calling thread here;
- PyTorch's own kernels. Attention by them ("sdpa") is two empty tensors here, and of the gradients of attention and of
  a transition's log-prob, which are PyTorch's too, nothing is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import star_kernels as sk

ROUNDS, CALLS = 25, 100
Cases = dict[str, Callable[[], object]]


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def attention_cases() -> Cases:
    """At the size of Stable Diffusion 3.5 medium at 512 px."""
    from star_kernels.attention import sdpa

    batch, heads, image, text, dim, units = 8, 24, 1024, 205, 64, 8
    shape = (batch, image + text, heads, dim)
    query, key, value = (meta(*shape, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    tracked = [meta(*shape, dtype=torch.bfloat16, grad=True).transpose(1, 2) for _ in range(3)]
    out, log_sum_exp = torch.empty_like(query), meta(batch, heads, image + text)
    weights = meta(batch, text, units, dtype=torch.bfloat16)
    images, texts = slice(0, image), slice(image, None)

    def vendors(*_: object) -> tuple[Tensor, Tensor]:
        empty = torch.empty_strided
        return (
            empty(out.shape, out.stride(), dtype=out.dtype, device="meta"),
            empty(log_sum_exp.shape, log_sum_exp.stride(), dtype=log_sum_exp.dtype, device="meta"),
        )

    sdpa.attention, sdpa._kernel_for = vendors, lambda *_: "flash"  # type: ignore[assignment]

    def attend(implementation: Any, captures: bool, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
        options: dict[str, Any] = {"num_image_tokens": image, "implementation": implementation}
        given = weights if captures else None
        return lambda: sk.joint_attention(q, k, v, given, **options)

    return {
        "attention, fused": attend("fused", False, query, key, value),
        "attention with capture, fused": attend("fused", True, query, key, value),
        "attention with capture, fused, under autograd": attend("fused", True, *tracked),
        "attention with capture, sdpa": attend("sdpa", True, query, key, value),
        "attention mass": lambda: sk.attention_mass(
            query[:, :, images], key[:, :, texts], weights, log_sum_exp[:, :, images]
        ),
        **{f"recorded layer, {each}": recorded_layer(each, query, key, value, weights) for each in ("fused", "sdpa")},
    }


def recorded_layer(implementation: Any, *tensors: Tensor) -> Callable[[], object]:
    """What recording does in a block of Stable Diffusion 3 from query, key and value to the output."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(num_layers=1, num_attention_heads=24, attention_head_dim=64)
    query, key, value, weights = tensors
    recording = sk.record_attention(model, weights, implementation=implementation)
    recorder = recording.__enter__()
    attend = model.transformer_blocks[0].attn.processor.attend
    recording.__exit__(None, None, None)

    def run() -> None:
        attend(query, key, value, num_image_tokens=1024, text_first=False)
        recorder.discard_step()

    return run


def latent_cases() -> Cases:
    """At the size of Stable Diffusion 3.5 medium at 512 px."""
    batch, channels, size = 8, 16, 64
    shape = (batch, channels, size, size)
    velocity, unconditional, reference = (meta(*shape, dtype=torch.bfloat16) for _ in range(3))
    trained = meta(*shape, dtype=torch.bfloat16, grad=True)
    sample, noise, one = meta(*shape), meta(*shape), meta()
    old_log_prob, advantage = meta(batch, size, size), meta(batch)
    mass, weights = meta(batch, size // 2 * size // 2, 8), meta(batch, size // 2, size // 2)
    rows = sk.TransitionCoefficients(meta(batch), meta(batch), meta(batch))
    number = sk.transition_coefficients("flow_sde", 0.8, 0.7)
    grid = (size // 2, size // 2)

    def step(coefficients: sk.TransitionCoefficients, **options: Any) -> Callable[[], object]:
        return lambda: sk.transition_step(velocity, sample, coefficients, noise=noise, **options)

    def loss(prediction: Tensor, **options: Any) -> Callable[[], Tensor]:
        given = (sample, noise, old_log_prob, advantage, rows)
        return lambda: sk.policy_loss(prediction, *given, weights=weights, **options).loss

    def trains(**options: Any) -> Callable[[], object]:
        forward = loss(trained, **options)
        return lambda: torch.autograd.grad(forward(), trained, one)

    guided: dict[str, Any] = {"unconditional_velocity": unconditional, "guidance_scale": 4.5}
    with_kl: dict[str, Any] = {"reference_velocity": reference, "kl_weight": 0.01}
    return {
        "allocation map": lambda: sk.allocation_map(mass, grid),
        "allocation map, sharpened and clamped": lambda: sk.allocation_map(mass, grid, sharpness=2.0, clamp=(0.2, 5.0)),
        "transition step": step(rows),
        "transition step, guidance": step(rows, **guided),
        "transition step, one row on the CPU": step(number),
        "transition log-prob": lambda: sk.transition_log_prob(velocity, sample, noise, rows),
        "policy loss, no gradient": loss(velocity),
        "policy loss": loss(trained),
        "policy loss with KL and guidance": loss(trained, **with_kl, **guided),
        "policy loss and its backward": trains(),
        "policy loss of images and its backward": trains(granularity="image"),
    }


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        return torch.empty_strided((), (), device="meta")

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.empty_strided((), (), device="meta")


def empty_autograd() -> Cases:
    given, one = meta(grad=True), meta()
    return {"an empty autograd function and its backward": lambda: torch.autograd.grad(_Empty.apply(given), given, one)}


def measure(calls: Cases, rounds: int) -> dict[str, float]:
    """Microseconds per call, the median over rounds in which every case is called in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(CALLS):
            call()
    gc.disable()
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(CALLS // 10):  # what the case before has swept out of the caches
                call()
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            seconds[name].append((time.thread_time() - start) / CALLS)
    gc.enable()
    return {name: 1e6 * statistics.median(times) for name, times in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)

    import triton

    from bench import stub_driver
    from star_kernels import backends

    folder = Path(triton.knobs.cache.dir) / "star_kernels_stub_driver"
    folder.mkdir(parents=True, exist_ok=True)
    stub_driver.activate(folder)
    backends._missing_triton = lambda: None
    calls = attention_cases() | latent_cases() | empty_autograd()
    Tensor.is_meta = False  # they stand for tensors that kernels can read
    figures = measure(calls, options.rounds)
    if options.json:
        json.dump({"triton": triton.__version__, "torch": torch.__version__, "microseconds": figures}, sys.stdout)
        return
    print(f"Triton {triton.__version__}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    for name, microseconds in figures.items():
        print(f"{microseconds:8.1f} µs  {name}")


if __name__ == "__main__":
    main()
