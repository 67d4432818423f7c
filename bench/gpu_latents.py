"""The section of `bench/gpu.py` on latents: transition, policy loss and allocation map, against copy bandwidth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

import star_kernels as sk
from bench import latent_cases as cases
from bench.gpu_report import Report, relative_error
from bench.harness import Member
from bench.latent_cases import LatentCase
from star_kernels.allocation import reference as allocation_reference
from star_kernels.policy_loss import reference as loss_reference

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def run(report: Report) -> None:
    """Correctness, then times at each batch size."""
    copied = _copy_rate(report)
    batches = (2,) if report.toy else (9, 64, 256)
    for dtype in LIMITS:
        case = _case(report, batches[0], dtype)
        for check in (_check_loss, _check_step):
            report.guard(f"{check.__name__}, {dtype}", functools.partial(check, report, case))
    report.guard("allocation map", functools.partial(_check_allocation, report))
    for batch in batches:
        # Every batch size gets a graph of its own, so that none is slowed down by having to fit them all.
        torch.compiler.reset()
        report.guard(f"B {batch}", functools.partial(_times, report, batch, copied))
    torch.compiler.reset()


def _case(report: Report, batch: int, dtype: torch.dtype) -> LatentCase:
    channels, side = (4, 8) if report.toy else (16, 64)
    return cases.make_case(batch, channels, side, report.device, velocity_dtype=dtype)


def _copy_rate(report: Report) -> float:
    """GB/s of a large copy, reads and writes counted: what the memory-bound kernels are measured against."""
    count = 2**16 if report.toy else 2**28
    source = torch.ones(count, device=report.device)
    target = torch.empty_like(source)
    work = {"GB": 2 * cases.total_bytes(source) / 1e9}
    group = report.measure("copy", [Member("copy", lambda: target.copy_(source), work=work)], budget=0.5)
    return group["copy"].rates["GB/s"] if group is not None else float("nan")


def _check_loss(report: Report, case: LatentCase) -> None:
    _, _, exact = loss_reference.policy_loss_and_gradient(cases.loss_inputs(cases.in_float64(case)))
    gradient = cases.loss_and_backward(case, report.backend)
    what = f"policy loss, {case}"
    report.check(f"{what}, gradient", relative_error(gradient, exact), LIMITS[case.velocity.dtype])
    report.check_equal(f"{what}, gradient of a second run", gradient, cases.loss_and_backward(case, report.backend))


def _check_step(report: Report, case: LatentCase) -> None:
    exact = cases.step(cases.in_float64(case), "reference")
    step = cases.step(case, report.backend)
    assert step.log_prob is not None and exact.log_prob is not None
    what = f"transition, {case}"
    report.check(f"{what}, next sample", relative_error(step.next_sample, exact.next_sample), 1e-5)
    report.check(f"{what}, log-prob", relative_error(step.log_prob, exact.log_prob), 1e-5)
    # On policy a ratio is exactly 1 only if the two operators give the same log-prob.
    log_prob = sk.transition_log_prob(
        case.velocity, case.sample, step.next_sample, case.coefficients, backend=report.backend
    )
    report.check_equal(f"{what}, log-prob of the stored next sample", log_prob, step.log_prob)


def _check_allocation(report: Report) -> None:
    mass, grid = _mass(report, batch=3)
    for name, options in _allocation_options().items():
        exact = allocation_reference.allocation_map(mass.double(), grid, **options)
        weights = sk.allocation_map(mass, grid, backend=report.backend, **options)
        report.check(f"allocation map, {name}", relative_error(weights, exact), 1e-5)


def _mass(report: Report, batch: int) -> tuple[torch.Tensor, tuple[int, int]]:
    side = 8 if report.toy else 64
    mass = torch.rand(batch, side * side, 8, generator=torch.Generator().manual_seed(0))
    return mass.to(report.device), (side, side)


def _allocation_options() -> dict[str, dict[str, Any]]:
    return {"plain": {}, "sharp, smooth": {"sharpness": 2.0, "smooth": True}}


def _times(report: Report, batch: int, copied: float) -> None:
    compiler = "eager" if report.toy else "inductor"
    for dtype in LIMITS:
        case = _case(report, batch, dtype)
        _measure(
            report,
            f"policy loss forward and backward, {case}",
            {
                "eager": cases.eager_loss(case),
                "torch.compile": cases.compiled_loss(case, compiler),
                "torch.compile, gradient written out": cases.compiled_loss_and_gradient(case, compiler),
                "fused": functools.partial(cases.loss_and_backward, case, report.backend),
            },
            cases.loss_bytes(case),
            copied,
        )
    case = _case(report, batch, torch.bfloat16)
    _measure(
        report,
        f"transition step, {case}",
        {
            "eager": cases.eager_step(case),
            "torch.compile": cases.compiled_step(case, compiler),
            "fused": functools.partial(cases.step, case, report.backend),
        },
        cases.step_bytes(case),
        copied,
    )
    mass, grid = _mass(report, batch)
    call = functools.partial(sk.allocation_map, mass, grid)
    _measure(
        report,
        f"allocation map, B {batch}, {grid[0]} x {grid[1]} tokens, K 8",
        {
            "eager": functools.partial(call, backend="reference"),
            "fused": functools.partial(call, backend=report.backend),
        },
        cases.total_bytes(mass, mass[..., 0]),
        copied,
    )


def _measure(report: Report, name: str, calls: Mapping[str, Callable[[], object]], moved: int, copied: float) -> None:
    """Time the members; the rate is that of the bytes that have to move, and its share of the copy's is a figure."""
    work = {"GB": moved / 1e9}
    members = [Member(key, call, baseline=key == "eager", work=work) for key, call in calls.items()]
    group = report.measure(name, members, budget=1.5)
    if group is None:
        return
    for measurement in group.measurements:
        if measurement.name == "fused":
            report.figure(f"{name}, fused, share of copy bandwidth", measurement.rates["GB/s"] / copied)
