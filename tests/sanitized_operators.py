"""Runs every operator of the C++ extension named on the command line, at small and awkward shapes.

tests/test_sanitizers.py builds that extension with the sanitizers, which end the process at the first error. Other
tests hold what is computed; here it has to be finite.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = ("default", "avx2", "avx512", "avx512_bf16")


def load_extension(path: Path) -> None:
    """Make the extension at `path` the one that star_kernels finds."""
    spec = importlib.util.spec_from_file_location("star_kernels._C", path)
    assert spec is not None and spec.loader is not None
    sys.modules["star_kernels._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["star_kernels._C"])


def levels() -> list[str]:
    """The instruction sets that this CPU has."""
    capability = sys.modules["star_kernels._C"].cpu_capability()
    return [name for name in LEVELS if name == "default" or capability[name]]


@contextlib.contextmanager
def level(name: str) -> Iterator[None]:
    os.environ["STAR_KERNELS_CPU_CAPABILITY"] = name
    try:
        yield
    finally:
        del os.environ["STAR_KERNELS_CPU_CAPABILITY"]


def assert_finite(*tensors: Tensor | None) -> None:
    assert all(tensor is None or bool(tensor.isfinite().all()) for tensor in tensors)


def spread(tensor: Tensor, order: tuple[int, ...], step: int = 1) -> Tensor:
    """The same numbers in memory that is ordered by `order`, every step-th of the innermost."""
    permuted = tensor.permute(order)
    room = tensor.new_empty(*permuted.shape[:-1], permuted.shape[-1] * step)[..., ::step]
    room.copy_(permuted)
    return room.permute([order.index(dim) for dim in range(tensor.dim())])


def attend(
    dtype: torch.dtype,
    image: int,
    text: int,
    units: int,
    *,
    dim: int = 64,
    heads: int = 2,
    batch: int = 2,
    cross: bool = False,
    layout: str = "heads",
    **options: Any,
) -> None:
    import star_kernels as sk

    num_keys = text if cross else image + text
    num_queries = image if cross else image + text

    def tokens(count: int) -> Tensor:
        plain = torch.randn(batch, heads, count, dim).to(dtype)
        if layout == "tokens":
            return spread(plain, (0, 2, 1, 3)).requires_grad_()
        return (spread(plain, (0, 1, 2, 3), 2) if layout == "gaps" else plain).requires_grad_()

    query, key, value = tokens(num_queries), tokens(num_keys), tokens(num_keys)
    first, end = options.get("rows", (0, batch))
    unit_weights = torch.rand(end - first, text, units) if units else None
    out, mass = sk.joint_attention(query, key, value, unit_weights, num_image_tokens=image, backend="cpu", **options)
    out.sum().backward()
    assert_finite(out, mass, query.grad, key.grad, value.grad)


def take_mass(
    dtype: torch.dtype, image: int, text: int, units: int, *, dim: int = 64, layout: str = "heads", **options: Any
) -> None:
    import star_kernels as sk

    rows, heads = 2, 2
    num_queries, num_keys = (image, text) if options["direction"] == "image_to_text" else (text, image)

    def spread_out(*shape: int) -> Tensor:
        plain, tail = torch.randn(rows, heads, *shape), range(3, 2 + len(shape))
        return spread(plain, (0, 2, 1, *tail), 2 if layout == "gaps" else 1) if layout != "heads" else plain

    query, key = spread_out(num_queries, dim).to(dtype), spread_out(num_keys, dim).to(dtype)
    unit_weights = torch.rand(rows, text, units) * (torch.rand(rows, text, 1) < 0.7)
    log_sum_exp = 4 + spread_out(num_queries)
    assert_finite(sk.attention_mass(query, key, unit_weights, log_sum_exp, backend="cpu", **options))


def run_attention() -> None:
    for dtype, direction in itertools.product(FLOATS, ("image_to_text", "text_to_image")):
        for units in (1, 16, 17):
            attend(dtype, 1, 1, units, direction=direction)
            attend(dtype, 97, 17, units, direction=direction, text_first=units == 17, layout="tokens")
        attend(dtype, 97, 300, 3, direction=direction, text_lengths=torch.tensor([257, 0]))
        for units, layout in itertools.product((1, 17), ("heads", "tokens", "gaps")):
            take_mass(dtype, 1, 1, units, direction=direction, layout=layout)
            take_mass(dtype, 97, 259, units, direction=direction, layout=layout, dim=33)
            take_mass(dtype, 193, 31, units, direction=direction, text_lengths=torch.tensor([0, 23]))
        attend(dtype, 23, 31, 3, dim=33, direction=direction, layout="gaps", rows=(1, 2))
        attend(dtype, 5, 259, 2, dim=96, direction=direction, heads=1)
    for dtype in FLOATS:
        attend(dtype, 1, 0, 0)
        attend(dtype, 257, 0, 0, dim=1)
        attend(dtype, 25, 0, 0, dim=130, layout="gaps")
        attend(dtype, 19, 7, 0, dim=40)
        attend(dtype, 1, 33, 2, cross=True)
        attend(dtype, 50, 77, 5, cross=True, dim=40, layout="tokens")
        attend(dtype, 193, 65, 8, heads=3)


def run_allocation_map() -> None:
    import star_kernels as sk

    for dtype, (h, w), units in itertools.product((*FLOATS, torch.float64), [(1, 1), (1, 7), (5, 3)], (1, 17)):
        mass = spread(torch.rand(3, h * w, units), (2, 0, 1)).to(dtype)
        mass[1] = 0
        mask = torch.rand(3, h, w) > 0.3
        mask[:, 0, 0] = True
        for combine, smooth in itertools.product(("mean", "max"), (False, True)):
            assert_finite(sk.allocation_map(mass, (h, w), combine=combine, smooth=smooth, backend="cpu"))
            options = {"sharpness": 2.5, "strength": 0.7, "clamp": (0.2, 3.0), "mask": mask}
            assert_finite(sk.allocation_map(mass, (h, w), combine=combine, smooth=smooth, backend="cpu", **options))
    with contextlib.suppress(ValueError):
        sk.allocation_map(torch.full((2, 4, 3), float("nan")), (2, 2), backend="cpu")
        raise AssertionError("a mass of NaN was accepted")


def run_latent_operators(
    dtype: torch.dtype,
    channels: int,
    height: int,
    width: int,
    layout: str,
    granularity: str,
    full: bool,
    objective: str = "clip",
) -> None:
    import star_kernels as sk

    def latent(scale: float = 1.0) -> Tensor:
        plain = (scale * torch.randn(2, channels, height, width)).to(dtype)
        if layout == "gaps":
            return spread(plain, (0, 1, 2, 3), 2)
        return plain.to(memory_format=torch.channels_last) if layout == "channels_last" else plain

    sigma = torch.tensor([0.9, 0.5])
    coefficients = sk.transition_coefficients("flow_sde", sigma, 0.8 * sigma)
    velocity, sample = latent(), latent()
    guidance: dict[str, Any] = {"unconditional_velocity": latent(), "guidance_scale": 3.5} if full else {}
    step = sk.transition_step(velocity, sample, coefficients, noise=latent(), backend="cpu", **guidance)
    again = sk.transition_log_prob(velocity, sample, step.next_sample, coefficients, backend="cpu", **guidance)
    assert_finite(step.next_sample, step.log_prob, again)
    sk.transition_step(
        velocity, sample, sk.transition_coefficients("ode", sigma, 0.8 * sigma), noise=None, backend="cpu"
    )

    mask = torch.rand(2, height, width) > 0.3
    mask[:, 0, 0] = True
    options: dict[str, Any] = {}
    if full:
        tokens = (height // 2 if height % 2 == 0 else height, width // 3 if width % 3 == 0 else width)
        options = {"weights": torch.rand(2, *tokens), "mask": mask, "kl_weight": 0.1}
        options["reference_velocity"] = latent()
        options |= {"objective": objective, "old_velocity": velocity + latent(1e-3), "divergence_limit": 1e-6}
    velocity = (velocity + latent(1e-3)).detach().requires_grad_()
    loss, metrics = sk.policy_loss(
        velocity,
        sample,
        step.next_sample,
        step.log_prob,
        torch.randn(2),
        coefficients,
        clip_range=1e-3,
        granularity=granularity,
        backend="cpu",
        **guidance,
        **options,
    )
    loss.backward()
    assert_finite(loss, velocity.grad, *metrics.values())


def run_latents() -> None:
    shapes = [(1, 1), (3, 5), (9, 15), (33, 33)]
    for dtype, layout, granularity in itertools.product(
        FLOATS, ("contiguous", "channels_last", "gaps"), ("position", "image")
    ):
        for index, channels in enumerate((1, 3, 4, 8, 16, 32)):
            objective = ("clip", "guard", "dppo")[index // 2]
            run_latent_operators(dtype, channels, *shapes[index % 4], layout, granularity, index % 2 == 0, objective)
            run_latent_operators(
                dtype, channels, *shapes[(index + 2) % 4], layout, granularity, index % 2 == 1, objective
            )
    # Above the size from which the kernels read long rows and write past the cache.
    for granularity, full in itertools.product(("position", "image"), (False, True)):
        run_latent_operators(torch.float32, 16, 192, 192, "contiguous", granularity, full)
        run_latent_operators(torch.bfloat16, 16, 275, 273, "contiguous", granularity, full, "guard")
    run_latent_operators(torch.float32, 16, 193, 192, "channels_last", "position", True)
    run_latent_operators(torch.float32, 64, 93, 101, "contiguous", "position", True)


def main(path: Path) -> None:
    load_extension(path)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for name in levels():
        with level(name):
            run_attention()
            if name != "avx512_bf16":
                run_latents()
        print(f"ran {name}", flush=True)
    run_allocation_map()
    print("ran all")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
