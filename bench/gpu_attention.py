"""The attention sections of `bench/gpu.py`: correctness against float64, and times against PyTorch's SDPA backends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import star_kernels as sk
from bench import attention_cases as cases
from bench.attention_cases import Inputs, Shape, make_inputs, make_unit_weights
from bench.gpu_report import Report, relative_error
from bench.harness import Member
from star_kernels.attention import reference

# Limits of the relative error against float64: of the output, and of the mass.
LIMITS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 5e-3), torch.float16: (1e-2, 5e-3)}
SDPA_BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
AWKWARD = (
    Shape("one image and one text token", 1, 1, 64, 1, 1, 1),
    Shape("odd lengths, K 17", 2, 3, 64, 131, 17, 17),
    Shape("head dim 32, K 16", 1, 2, 32, 100, 29, 16),
    Shape("head dim 96", 1, 2, 96, 65, 31, 3),
    Shape("head dim 128", 2, 2, 128, 257, 77, 8),
)


sdpa: Callable[..., Tensor] = scaled_dot_product_attention


def shapes(report: Report) -> list[Shape]:
    if report.toy:
        return [Shape("S", 2, 1, 32, 10, 5, 3), Shape("L", 2, 2, 32, 20, 9, 3)]
    return [cases.sd35_medium("S", batch=8), cases.sd35_medium("L", batch=8)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def correctness(report: Report) -> None:
    """S and L in all dtypes against float64 on the first and the last sample, then small awkward shapes."""
    for shape in shapes(report):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            what = f"{shape.name}, {name_of(dtype)}"
            if not report.out_of_time(what):
                report.guard(what, functools.partial(_check_shape, report, shape, dtype, what))
    for shape in AWKWARD[:1] if report.toy else AWKWARD:
        for dtype in (torch.bfloat16, torch.float32):
            what = f"{shape.name}, {name_of(dtype)}"
            if not report.out_of_time(what):
                report.guard(what, functools.partial(_check_variants, report, shape, dtype, what))


def _check_shape(report: Report, shape: Shape, dtype: torch.dtype, what: str) -> None:
    inputs = make_inputs(shape, dtype, report.device)
    out_limit, mass_limit = LIMITS[dtype]
    out, mass = cases.fused(inputs, capture=True, backend=report.backend)
    plain, _ = cases.fused(inputs, capture=False, backend=report.backend)
    again, mass_again = cases.fused(inputs, capture=True, backend=report.backend)
    assert mass is not None and mass_again is not None
    report.check_equal(f"{what}, output of a second run", out, again)
    report.check_equal(f"{what}, mass of a second run", mass, mass_again)
    to_image = _attend(inputs, report.backend, direction="text_to_image")[1]
    assert to_image is not None
    for b in (0, shape.batch - 1):
        one = _sample(inputs, b)
        exact_out, exact_mass, _ = _exact(one)
        report.check(f"{what}, output with capture, sample {b}", relative_error(out[b : b + 1], exact_out), out_limit)
        report.check(f"{what}, output without, sample {b}", relative_error(plain[b : b + 1], exact_out), out_limit)
        report.check(f"{what}, mass, sample {b}", relative_error(mass[b : b + 1], exact_mass), mass_limit)
        exact_to_image = _exact_to_image(one)
        error = relative_error(to_image[b : b + 1], exact_to_image)
        report.check(f"{what}, text to image, sample {b}", error, mass_limit)
        alone, mass_alone = cases.fused(one, capture=True, backend=report.backend)
        assert mass_alone is not None
        report.check_equal(f"{what}, output of sample {b} alone", out[b : b + 1], alone)
        report.check_equal(f"{what}, mass of sample {b} alone", mass[b : b + 1], mass_alone)
    _check_backward(report, inputs, what, out_limit)


def _check_backward(report: Report, inputs: Inputs, what: str, limit: float) -> None:
    """Gradients of the last sample: no further from float64 than SDPA's, give or take."""
    one = _sample(inputs, inputs.query.shape[0] - 1)
    grad_out = torch.randn(one.query.shape, generator=torch.Generator().manual_seed(1)).to(one.query)
    exact_out, _, log_sum_exp = _exact(one)
    grad, query, key, value = (tensor.double() for tensor in (grad_out, *one.qkv))
    scale = one.query.shape[-1] ** -0.5
    exact = reference.attention_backward(grad, query, key, value, exact_out, log_sum_exp, scale)
    leaves = [tensor.detach().requires_grad_() for tensor in one.qkv]
    ours = torch.autograd.grad(_attend(replace_qkv(one, leaves), report.backend)[0], leaves, grad_out)
    theirs = torch.autograd.grad(sdpa(*leaves), leaves, grad_out)
    for name, our, their, expected in zip(("query", "key", "value"), ours, theirs, exact, strict=True):
        sdpa_error = relative_error(their, expected)
        report.check(
            f"{what}, gradient of {name} (SDPA: {sdpa_error:.2e})",
            relative_error(our, expected),
            max(limit, 1.5 * sdpa_error),
        )


def _check_variants(report: Report, shape: Shape, dtype: torch.dtype, what: str) -> None:
    """Text first, strided views as diffusers makes them, some rows only, no text at all, cross-attention."""
    inputs = make_inputs(shape, dtype, report.device)
    out_limit, mass_limit = LIMITS[dtype]
    exact_out, exact_mass, _ = _exact(inputs)

    def compare(variant: str, out: Tensor, mass: Tensor | None, expected: Tensor, expected_mass: Tensor) -> None:
        assert mass is not None
        report.check(f"{what}, {variant}, output", relative_error(out, expected), out_limit)
        report.check(f"{what}, {variant}, mass", relative_error(mass, expected_mass), mass_limit)

    compare("image first", *_attend(inputs, report.backend), exact_out, exact_mass)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs.qkv]
    compare("strided", *_attend(replace_qkv(inputs, strided), report.backend), exact_out, exact_mass)
    rolled = [tensor.roll(shape.text, dims=2) for tensor in inputs.qkv]
    out, mass = _attend(replace_qkv(inputs, rolled), report.backend, text_first=True)
    compare("text first", out.roll(-shape.text, dims=2), mass, exact_out, exact_mass)
    last = shape.batch - 1
    some = replace(inputs, unit_weights=inputs.unit_weights[last:])
    compare("last row", *_attend(some, report.backend, rows=(last, last + 1)), exact_out, exact_mass[last:])

    image = slice(0, shape.image)
    query, text_key, text_value = inputs.query[:, :, image], inputs.key[:, :, shape.image :], inputs.value
    cross = replace(inputs, query=query, key=text_key, value=text_value[:, :, shape.image :])
    compare("cross-attention", *_attend(cross, report.backend), *_exact(cross)[:2])
    only = [tensor[:, :, image] for tensor in inputs.qkv]
    out, _ = cases.fused(replace_qkv(inputs, only), capture=False, backend=report.backend)
    expected = sdpa(*(tensor.double() for tensor in only))
    report.check(f"{what}, without text, output", relative_error(out, expected), out_limit)


def replace_qkv(inputs: Inputs, tensors: list[Tensor]) -> Inputs:
    query, key, value = tensors
    return replace(inputs, query=query, key=key, value=value)


def _attend(inputs: Inputs, backend: str, **options: Any) -> tuple[Tensor, Tensor | None]:
    options = {"num_image_tokens": inputs.num_image_tokens, "backend": backend, **options}
    return sk.joint_attention(inputs.query, inputs.key, inputs.value, inputs.unit_weights, **options)


def _sample(inputs: Inputs, b: int) -> Inputs:
    query, key, value, unit_weights = (tensor[b : b + 1] for tensor in (*inputs.qkv, inputs.unit_weights))
    return Inputs(query, key, value, unit_weights, inputs.num_image_tokens)


def _exact(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mass and log-sum-exp in float64, of the inputs as they were rounded."""
    query, key, value, unit_weights = (tensor.double() for tensor in (*inputs.qkv, inputs.unit_weights))
    out, mass, log_sum_exp = reference.joint_attention(
        query,
        key,
        value,
        unit_weights,
        num_image_tokens=inputs.num_image_tokens,
        text_first=False,
        scale=inputs.query.shape[-1] ** -0.5,
        rows=(0, inputs.query.shape[0]),
    )
    assert mass is not None
    return out, mass, log_sum_exp


def _exact_to_image(inputs: Inputs) -> Tensor:
    return reference.text_to_image_mass(
        inputs.query.double(),
        inputs.key.double(),
        inputs.unit_weights.double(),
        num_image_tokens=inputs.num_image_tokens,
        text_first=False,
        scale=inputs.query.shape[-1] ** -0.5,
    )


def speed(report: Report) -> None:
    """Forward and backward at S and L against every SDPA backend of the machine; the baseline is the fastest."""
    for shape in shapes(report)[: 1 if report.toy else None]:
        for dtype in (torch.bfloat16, torch.float32):
            if dtype == torch.float32 and (shape.name == "L" or report.toy):
                continue
            what = f"attention forward, {shape}, {name_of(dtype)}"
            report.guard(what, functools.partial(_forward, report, shape, dtype, what))
        what = f"attention backward, {shape}, bfloat16"
        report.guard(what, functools.partial(_backward, report, shape, what))
        if report.device.type == "cuda":
            report.guard(f"kernels of a capture, {shape.name}", functools.partial(_kernels, report, shape))


def _sdpa_backends(report: Report, inputs: Inputs, what: str) -> dict[str, Callable[[Inputs], Tensor]]:
    """PyTorch's SDPA by backend, those that take these inputs."""
    available: dict[str, Callable[[Inputs], Tensor]] = {}
    for name, backend in SDPA_BACKENDS.items():
        call = functools.partial(_sdpa, backend)
        try:
            call(inputs)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            report.leave_out(f"{what}: SDPA {name}", error)
        else:
            available[f"SDPA {name}"] = call
    return available


def _sdpa(backend: SDPBackend, inputs: Inputs) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(*inputs.qkv)


def _forward(report: Report, shape: Shape, dtype: torch.dtype, what: str) -> None:
    inputs = make_inputs(shape, dtype, report.device)
    attend = functools.partial(_attend, backend=report.backend)
    total = torch.zeros(shape.batch, shape.image, shape.units, device=report.device)
    half = replace(inputs, unit_weights=inputs.unit_weights[shape.batch // 2 :])
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(call, inputs) for name, call in _sdpa_backends(report, inputs, what).items()
    }
    calls["fused, no capture"] = functools.partial(cases.fused, inputs, capture=False, backend=report.backend)
    for units in (4, 8, 16):
        other = replace(inputs, unit_weights=make_unit_weights(replace(shape, units=units), report.device))
        calls[f"fused, K {units}"] = functools.partial(attend, other)
    calls |= {
        f"fused, K {shape.units}, added to the step's mass": functools.partial(attend, inputs, mass=total),
        f"fused, K {shape.units}, half of the rows": functools.partial(
            attend, half, rows=(shape.batch // 2, shape.batch)
        ),
        f"fused, K {shape.units}, text to image": functools.partial(attend, inputs, direction="text_to_image"),
        "SDPA, then text columns": functools.partial(cases.text_column_pass, inputs),
        "materialised": functools.partial(cases.materialised, inputs),
        "materialised, reference": functools.partial(cases.fused, inputs, capture=True, backend="reference"),
    }
    work = {"TFLOP": shape.operations / 1e12}
    members = [Member(name, call, work=work) for name, call in calls.items()]
    report.measure(what, members, budget=4.0, fastest="SDPA ")


def _backward(report: Report, shape: Shape, what: str) -> None:
    inputs = make_inputs(shape, torch.bfloat16, report.device)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.qkv]
    tracked = replace_qkv(inputs, leaves)
    grad_out = torch.randn_like(inputs.query)
    forwards: dict[str, Callable[[Inputs], Tensor]] = dict(_sdpa_backends(report, tracked, what))
    forwards["fused"] = lambda inputs: _attend(inputs, report.backend)[0]
    work = {"TFLOP": 2.5 * shape.operations / 1e12}
    members: list[Member] = []

    def add(name: str, forward: Callable[[Inputs], Tensor]) -> None:
        out = forward(tracked)
        backward = functools.partial(torch.autograd.grad, out, leaves, grad_out, retain_graph=True)
        members.append(Member(name, backward, work=work))

    for name, forward in forwards.items():
        report.guard(f"{what}: {name}", functools.partial(add, name, forward))
    report.measure(what, members, fastest="SDPA ")


def _kernels(report: Report, shape: Shape) -> None:
    """Time on the GPU of each kernel that one call with capture launches: what the reduction of the mass takes."""
    inputs = make_inputs(shape, torch.bfloat16, report.device)
    call = functools.partial(cases.fused, inputs, capture=True, backend=report.backend)
    call()
    repetitions = 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repetitions):
            call()
        torch.cuda.synchronize(report.device)
    for event in profile.key_averages():
        microseconds = event.self_device_time_total / repetitions
        if microseconds > 0:
            report.figure(f"capture at {shape.name}, kernel {event.key[:80]}, microseconds", microseconds)
