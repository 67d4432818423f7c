"""How long the host is busy with one call of an operator on a GPU; no GPU is needed.

``python -m bench.host_time`` prints microseconds per call, median over rounds, with the Triton that Python finds.
PYTHONPATH=.venv/triton-3.6 in front measures the oldest supported one.

The tensors are on PyTorch's meta device and take the operators' path for a GPU: argument checks, autograd, allocation
of the results, the plan of the launches, and Triton's own launcher, whose C code reads and packs the arguments for a
driver library that does nothing (`bench.stub_driver`). Left out is what needs a GPU:

- the driver's launch, two to three microseconds for each kernel;
- the caching allocator in place of the meta device's empty tensors, and asking PyTorch for the current device and
  stream, under a microsecond each;
- handing a backward pass to the autograd thread of the device and back. It runs in the calling thread here;
- PyTorch's own kernels: the backward of attention, and what one tensor takes to be scaled.
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

ROUNDS, CALLS = 25, 100
Cases = dict[str, Callable[[], object]]


def cases() -> Cases:
    """Calls at the size of Stable Diffusion 3.5 medium at 512 px, by name."""
    return attention_cases() | latent_cases()


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def attention_cases() -> Cases:
    import star_kernels as sk

    batch, heads, image, text, dim, units = 8, 24, 1024, 205, 64, 8
    tokens = image + text

    def qkv(grad: bool) -> list[Tensor]:
        shape = (batch, tokens, heads, dim)
        return [meta(*shape, dtype=torch.bfloat16, grad=grad).transpose(1, 2) for _ in range(3)]

    weights, mass = meta(batch, text, units, dtype=torch.bfloat16), meta(batch, image, units)
    arguments: dict[str, Any] = {"num_image_tokens": image, "backend": "triton"}
    (q, k, v), (trained_q, trained_k, trained_v) = qkv(False), qkv(True)
    return {
        "attention": lambda: sk.joint_attention(q, k, v, **arguments),
        "attention with capture": lambda: sk.joint_attention(q, k, v, weights, mass=mass, **arguments),
        "attention with capture, under autograd": lambda: sk.joint_attention(
            trained_q, trained_k, trained_v, weights, mass=mass, **arguments
        ),
    }


def latent_cases() -> Cases:
    import star_kernels as sk

    batch, channels, size = 8, 16, 64
    shape = (batch, channels, size, size)
    latent = {name: meta(*shape, dtype=torch.bfloat16) for name in ("velocity", "unconditional", "reference")}
    sample, noise = meta(*shape), meta(*shape)
    trained = meta(*shape, dtype=torch.bfloat16, grad=True)
    old_log_prob, advantage = meta(batch, size, size), meta(batch)
    mass, weights = meta(batch, size // 2 * size // 2, 8), meta(batch, size // 2, size // 2)
    row: dict[str, Any] = {name: meta(batch) for name in ("sample_drift", "velocity_scale", "std")}
    coefficients = sk.TransitionCoefficients(**row)
    guided: dict[str, Any] = {"unconditional_velocity": latent["unconditional"], "guidance_scale": 4.5}
    allocation: dict[str, Any] = {"grid": (size // 2, size // 2), "backend": "triton"}
    objective: dict[str, Any] = {"weights": weights, "backend": "triton"}
    grad, one = meta(batch, size, size), meta()

    def loss(velocity: Tensor, **options: Any) -> Tensor:
        return sk.policy_loss(velocity, sample, noise, old_log_prob, advantage, coefficients, **objective, **options)[0]

    def log_prob(velocity: Tensor) -> Tensor:
        return sk.transition_log_prob(velocity, sample, noise, coefficients, backend="triton")

    def step(velocity: Tensor, **options: Any) -> object:
        return sk.transition_step(velocity, sample, coefficients, noise=noise, backend="triton", **options)

    everything = {**guided, "reference_velocity": latent["reference"], "kl_weight": 0.01}
    return {
        "allocation map": lambda: sk.allocation_map(mass, **allocation),
        "allocation map, sharpened and clamped": lambda: sk.allocation_map(
            mass, sharpness=2.0, clamp=(0.2, 5.0), **allocation
        ),
        "transition step": lambda: step(latent["velocity"]),
        "transition step, guidance": lambda: step(latent["velocity"], **guided),
        "transition log-prob": lambda: log_prob(latent["velocity"]),
        "transition log-prob and backward": lambda: torch.autograd.grad(log_prob(trained), trained, grad),
        "policy loss": lambda: loss(latent["velocity"]),
        "policy loss and backward": lambda: torch.autograd.grad(loss(trained), trained, one),
        "policy loss with KL and guidance, and backward": lambda: torch.autograd.grad(
            loss(trained, **everything), trained, one
        ),
        "policy loss of images, and backward": lambda: torch.autograd.grad(
            loss(trained, granularity="image"), trained, one
        ),
    }


def measure(calls: Cases, rounds: int = ROUNDS) -> dict[str, float]:
    """Microseconds per call, the median over rounds in which every case is called in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(CALLS):
            call()
    gc.disable()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            seconds[name].append((time.thread_time() - start) / CALLS)
        gc.collect()
    gc.enable()
    return {name: 1e6 * statistics.median(times) for name, times in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__.split("\n")[0])
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
    figures = measure(cases(), options.rounds)
    if options.json:
        json.dump({"triton": triton.__version__, "torch": torch.__version__, "microseconds": figures}, sys.stdout)
        return
    print(f"Triton {triton.__version__}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    for name, microseconds in figures.items():
        print(f"{microseconds:8.1f} µs  {name}")


if __name__ == "__main__":
    main()
