"""Attention in `bench/gpu.py`: correctness against float64, and times against all attention that the machine offers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import star_kernels as sk
from bench import attention_cases as cases
from bench.attention_cases import Shape, make_inputs, make_unit_weights
from bench.gpu_report import Report, relative_error
from bench.harness import Member
from star_kernels.attention import attention_implementation, reference

# Limits of the relative error against float64: of the output, and of the mass.
LIMITS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 5e-3), torch.float16: (1e-2, 5e-3)}
IMPLEMENTATIONS = ("fused", "sdpa")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """Arguments of `joint_attention`: query, key and value, unit weights, and by name the others."""

    qkv: tuple[Tensor, Tensor, Tensor]
    unit_weights: Tensor | None
    options: dict[str, Any]

    @property
    def rows(self) -> tuple[int, int]:
        return self.options.get("rows", (0, len(self.qkv[0])))

    def __call__(self, **options: Any) -> tuple[Tensor, Tensor | None]:
        return sk.joint_attention(*self.qkv, self.unit_weights, **self.options | options)

    def each(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = map(change, self.qkv)
        return query, key, value

    def sample(self, b: int) -> Call:
        """One sample by itself."""
        row = b - self.rows[0]
        units = None if self.unit_weights is None else self.unit_weights[row : row + 1]
        options = {name: option for name, option in self.options.items() if name != "rows"}
        if "text_lengths" in options:
            options["text_lengths"] = options["text_lengths"][b : b + 1]
        return Call(self.each(lambda tensor: tensor[b : b + 1]), units, options)

    def exact(self) -> Call:
        """In float64, by the definition."""
        units = None if self.unit_weights is None else self.unit_weights.double()
        return Call(self.each(Tensor.double), units, self.options | {"backend": "reference"})


def shapes(report: Report) -> list[Shape]:
    if report.toy:
        return [Shape("S", 2, 1, 32, 10, 5, 3), Shape("F", 2, 2, 32, 20, 9, 3)]
    return [cases.sd35_medium("S", batch=8), cases.sd35_medium("L", batch=8), cases.flux(batch=8)]


def make_call(shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    inputs = make_inputs(shape, dtype, device)
    return Call(inputs.qkv, inputs.unit_weights, {"num_image_tokens": shape.image, "text_first": shape.name == "F"})


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def correctness(report: Report) -> None:
    """Every use at S, what models do at the other shapes, in all dtypes, on the first and the last captured sample."""
    for shape in shapes(report):
        for dtype in LIMITS:
            for implementation in IMPLEMENTATIONS:
                what = f"{shape.name}, {name_of(dtype)}, {implementation}"
                report.guard(what, functools.partial(_check, report, shape, dtype, implementation, what))
            what = f"{shape.name}, {name_of(dtype)}, attention_mass"
            report.guard(what, functools.partial(_check_mass, report, shape, dtype, what))


def uses(call: Call, shape: Shape) -> dict[str, Call]:
    """What else can be asked of attention, by name."""
    units, options, last = call.unit_weights, call.options, shape.batch - 1
    assert units is not None
    token_major = call.each(lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2))
    image = call.each(lambda tensor: tensor[:, :, : shape.image])
    text = call.each(lambda tensor: tensor[:, :, shape.image :])
    return {
        "no capture": replace(call, unit_weights=None),
        "text to image": replace(call, options=options | {"direction": "text_to_image"}),
        "text first": replace(call, options=options | {"text_first": True}),
        "token-major": replace(call, qkv=token_major),
        "last row": replace(call, unit_weights=units[last:], options=options | {"rows": (last, last + 1)}),
        "cross-attention": replace(call, qkv=(image[0], *text[1:])),
        "no text": Call(image, None, options),
        "17 units": replace(call, unit_weights=make_unit_weights(replace(shape, units=17), units.device)),
    }


def _check(report: Report, shape: Shape, dtype: torch.dtype, implementation: str, what: str) -> None:
    ours = {"implementation": implementation, "backend": report.backend}
    out_limit, mass_limit = LIMITS[dtype]
    call = make_call(shape, dtype, report.device)
    lengths = torch.arange(1, shape.batch + 1) * shape.text // shape.batch - 1  # from few to all but one
    calls = {"capture": call, "text lengths": replace(call, options=call.options | {"text_lengths": lengths})}
    if shape.name == "S" and (dtype == torch.bfloat16 or not report.toy):
        calls |= uses(call, shape)
    for use, one in calls.items():
        out, mass = one(**ours)
        again, mass_again = one(**ours)
        report.check_equal(f"{what}, {use}, output of a second run", out, again)
        first, end = one.rows
        for b in sorted({first, end - 1}):
            where = f"{what}, {use}, sample {b}"
            exact, exact_mass = one.sample(b).exact()()
            alone, mass_alone = one.sample(b)(**ours)
            report.check(f"{where}, output", relative_error(out[b : b + 1], exact), out_limit)
            if implementation == "fused" or use == "text lengths":
                report.check_equal(f"{where} alone, output", out[b : b + 1], alone)
            else:  # PyTorch's kernels promise nothing.
                report.figure(f"{where} alone, output is the same", torch.equal(out[b : b + 1], alone))
            if mass is not None and mass_again is not None and exact_mass is not None and mass_alone is not None:
                row = slice(b - first, b - first + 1)
                report.check(f"{where}, mass", relative_error(mass[row], exact_mass), mass_limit)
                report.check_equal(f"{where}, mass of a second run", mass[row], mass_again[row])
                if implementation == "fused":
                    report.check_equal(f"{where} alone, mass", mass[row], mass_alone)
    last = call.sample(shape.batch - 1)
    exactly, theirs = _gradients(last.exact()), _gradients(last, lambda one: scaled_dot_product_attention(*one.qkv))
    first_run, second_run = (_gradients(last, lambda one: one(**ours)[0]) for _ in range(2))
    for name, expected, their, our, once_more in zip("qkv", exactly, theirs, first_run, second_run, strict=True):
        # No further from float64 than PyTorch's, give or take.
        limit = max(out_limit, 1.5 * relative_error(their, expected))
        report.check(f"{what}, gradient of {name}", relative_error(our, expected), limit)
        report.figure(f"{what}, gradient of {name} of a second run is the same", torch.equal(our, once_more))


def _gradients(call: Call, attend: Callable[[Call], Tensor] = lambda call: call()[0]) -> tuple[Tensor, ...]:
    leaves = call.each(lambda tensor: tensor.detach().requires_grad_())
    grad = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).to(leaves[0])
    return torch.autograd.grad(attend(replace(call, qkv=leaves)), leaves, grad)


def _check_mass(report: Report, shape: Shape, dtype: torch.dtype, what: str) -> None:
    """From a log-sum-exp as it comes from elsewhere, with heads innermost."""
    call = replace(make_call(shape, dtype, report.device).sample(shape.batch - 1), options={})
    options = {"num_image_tokens": shape.image, "text_first": False, "scale": shape.head_dim**-0.5, "rows": (0, 1)}
    exact = call.exact()
    _, expected, log_sum_exp = reference.joint_attention(*exact.qkv, exact.unit_weights, **options)
    assert expected is not None and call.unit_weights is not None
    log_sum_exp = log_sum_exp[:, :, : shape.image].float().transpose(1, 2).contiguous().transpose(1, 2)
    image, text = call.qkv[0][:, :, : shape.image], call.qkv[1][:, :, shape.image :]
    mass = sk.attention_mass(image, text, call.unit_weights, log_sum_exp, backend=report.backend)
    report.check(what, relative_error(mass, expected), LIMITS[dtype][1])


def speed(report: Report) -> None:
    """Forward, backward and the mass alone; the baseline is the fastest attention of the machine."""
    for shape in shapes(report)[: 1 if report.toy else None]:
        parts = [(part, torch.bfloat16) for part in (_forward, _backward, _mass)]
        if shape.name == "S" and not report.toy:
            parts.append((_forward, torch.float32))
        for part, dtype in parts:
            what = f"attention {part.__name__[1:]}, {shape}, {name_of(dtype)}"
            report.guard(what, functools.partial(part, report, shape, dtype, what))
        if report.device.type == "cuda":
            report.guard(f"kernels at {shape.name}", functools.partial(_kernels, report, shape))


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value)


def _flash(module: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention of a package of its own: tokens before heads, and in some versions a log-sum-exp beside it."""
    function = importlib.import_module(module).flash_attn_func
    out = function(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


BASELINES: dict[str, Attention] = {
    "SDPA cuDNN": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "SDPA flash": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "SDPA efficient": functools.partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "FlashAttention 3": functools.partial(_flash, "flash_attn_interface"),
    "FlashAttention 4": functools.partial(_flash, "flash_attn.cute"),
}


def _forward(report: Report, shape: Shape, dtype: torch.dtype, what: str) -> None:
    call = make_call(shape, dtype, report.device)
    qkv, units, half = call.qkv, call.unit_weights, shape.batch // 2
    assert units is not None
    lengths, half_text = torch.full((shape.batch,), shape.text // 2), f"K {shape.units}, half of the text"
    asked = {
        "no capture": replace(call, unit_weights=None),
        f"K {shape.units}": call,
        "K 16": replace(call, unit_weights=make_unit_weights(replace(shape, units=16), report.device)),
        f"K {shape.units}, half of the rows": replace(
            call, unit_weights=units[half:], options=call.options | {"rows": (half, shape.batch)}
        ),
        half_text: replace(call, options=call.options | {"text_lengths": lengths}),
        f"K {shape.units}, text to image": replace(call, options=call.options | {"direction": "text_to_image"}),
    }
    what += f", sdpa is {attention_implementation(*qkv[:2], implementation='sdpa').removeprefix('sdpa:')}"
    inputs = cases.Inputs(*qkv, units, shape.image)
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(baseline, *qkv) for name, baseline in report.available(what, BASELINES, *qkv).items()
    }
    calls |= {
        f"{name}, {use}": functools.partial(one, implementation=name, backend=report.backend)
        for name in IMPLEMENTATIONS
        for use, one in asked.items()
    }
    # Where the kernel reads them; the others are called a row at a time, by lengths that the host has to know.
    calls[f"fused, {half_text}"] = functools.partial(
        call, text_lengths=lengths.to(report.device), implementation="fused", backend=report.backend
    )
    extractors = {"SDPA, then text columns": cases.text_column_pass, "materialised": cases.materialised}
    found = report.available(what, extractors, inputs)
    calls |= {name: functools.partial(extract, inputs) for name, extract in found.items()}
    work = {"TFLOP": shape.operations / 1e12}
    report.measure(what, [Member(name, one, work=work) for name, one in calls.items()], budget=4.0, fastest=BASELINES)


def _backward(report: Report, shape: Shape, dtype: torch.dtype, what: str) -> None:
    call = replace(make_call(shape, dtype, report.device), unit_weights=None)
    leaves = call.each(Tensor.requires_grad_)
    grad = torch.randn_like(leaves[0])

    def backward(attend: Attention) -> Callable[[], object]:
        return functools.partial(torch.autograd.grad, attend(*leaves), leaves, grad, retain_graph=True)

    usable = report.available(what, {name: lambda a=attend: backward(a)() for name, attend in BASELINES.items()})
    calls = {name: backward(BASELINES[name]) for name in usable}
    for name in IMPLEMENTATIONS:
        calls[name] = backward(lambda *_, name=name: call(implementation=name, backend=report.backend)[0])
    work = {"TFLOP": 2.5 * shape.operations / 1e12}
    report.measure(what, [Member(name, one, work=work) for name, one in calls.items()], fastest=BASELINES)


def _mass(report: Report, shape: Shape, dtype: torch.dtype, what: str) -> None:
    """The mass from a log-sum-exp, against a copy that reads and writes as many bytes."""
    call = make_call(shape, dtype, report.device)
    image, text = call.qkv[0][:, :, : shape.image], call.qkv[1][:, :, shape.image :]
    assert call.unit_weights is not None
    log_sum_exp = torch.full(image.shape[:3], 10.0, device=report.device)
    arguments = (image, text, call.unit_weights, log_sum_exp)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in arguments)
    moved += 4 * shape.batch * shape.image * shape.units
    source = torch.empty(moved // 2, dtype=torch.uint8, device=report.device)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    mass = functools.partial(sk.attention_mass, *arguments, backend=report.backend)
    work = {"GB": moved / 1e9}
    members = [
        Member("copy of as many bytes", copy, baseline=True, work=work),
        Member("attention_mass", mass, work=work),
    ]
    report.measure(what, members, budget=0.5)


def _kernels(report: Report, shape: Shape) -> None:
    """The time on the GPU of each kernel that one call with capture launches."""
    call = make_call(shape, torch.bfloat16, report.device)
    for implementation in IMPLEMENTATIONS:
        run = functools.partial(call, implementation=implementation, backend=report.backend)
        run()
        repetitions = 10
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(repetitions):
                run()
            torch.cuda.synchronize(report.device)
        for event in profile.key_averages():
            microseconds = event.self_device_time_total / repetitions
            if microseconds > 0:
                report.figure(f"{shape.name}, {implementation}, kernel {event.key[:80]}, microseconds", microseconds)
