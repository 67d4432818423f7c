"""Transition, policy loss and allocation map in `bench/gpu.py`: correctness, and times against copy bandwidth."""

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
MAPS: dict[str, dict[str, Any]] = {"plain": {}, "sharp, smooth": {"sharpness": 2.0, "smooth": True}}


def run(report: Report) -> None:
    """Correctness, then times at each batch size."""
    for dtype in LIMITS:
        for check in (_check_loss, _check_step):
            report.guard(f"{check.__name__}, {dtype}", functools.partial(check, report, dtype))
    report.guard("allocation map", functools.partial(_check_allocation, report))
    for batch in (2,) if report.toy else (9, 64, 256):
        for dtype in LIMITS:
            report.guard(f"policy loss, B {batch}, {dtype}", functools.partial(_time_loss, report, batch, dtype))
        report.guard(f"transition, B {batch}", functools.partial(_time_step, report, batch))
        report.guard(f"allocation map, B {batch}", functools.partial(_time_allocation, report, batch))


def _case(report: Report, batch: int, dtype: torch.dtype) -> LatentCase:
    channels, side = (4, 8) if report.toy else (16, 64)
    return cases.make_case(batch, channels, side, report.device, velocity_dtype=dtype)


def _check_loss(report: Report, dtype: torch.dtype) -> None:
    case = _case(report, 2 if report.toy else 9, dtype)
    _, _, exact = loss_reference.policy_loss_and_gradient(cases.loss_inputs(cases.in_float64(case)))
    gradient = cases.loss_and_backward(case, report.backend)
    what = f"policy loss, {case}"
    report.check(f"{what}, gradient", relative_error(gradient, exact), LIMITS[dtype])
    report.check_equal(f"{what}, gradient of a second run", gradient, cases.loss_and_backward(case, report.backend))


def _check_step(report: Report, dtype: torch.dtype) -> None:
    case = _case(report, 2 if report.toy else 9, dtype)
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


def _mass(report: Report, batch: int) -> tuple[torch.Tensor, tuple[int, int]]:
    side = 8 if report.toy else 64
    mass = torch.rand(batch, side * side, 8, generator=torch.Generator().manual_seed(0))
    return mass.to(report.device), (side, side)


def _check_allocation(report: Report) -> None:
    mass, grid = _mass(report, batch=3)
    for name, options in MAPS.items():
        exact = allocation_reference.allocation_map(mass.double(), grid, **options)
        weights = sk.allocation_map(mass, grid, backend=report.backend, **options)
        report.check(f"allocation map, {name}", relative_error(weights, exact), 1e-5)


def _time_loss(report: Report, batch: int, dtype: torch.dtype) -> None:
    case = _case(report, batch, dtype)
    ours = functools.partial(cases.loss_and_backward, case, report.backend)
    calls: dict[str, Callable[[], object]] = {"eager": cases.eager_loss(case), "fused": ours}
    if batch == 64 and dtype == torch.bfloat16:  # It takes long to compile.
        calls["torch.compile"] = cases.compiled_loss(case, "inductor")
    _measure(report, f"policy loss forward and backward, {case}", calls, cases.loss_bytes(case))


def _time_step(report: Report, batch: int) -> None:
    case = _case(report, batch, torch.bfloat16)
    ours = functools.partial(cases.step, case, report.backend)
    calls: dict[str, Callable[[], object]] = {"eager": cases.eager_step(case), "fused": ours}
    if batch == 64:
        calls["torch.compile"] = cases.compiled_step(case, "inductor")
    _measure(report, f"transition step, {case}", calls, cases.step_bytes(case))


def _time_allocation(report: Report, batch: int) -> None:
    mass, grid = _mass(report, batch)
    names = {"eager": "reference", "fused": report.backend}
    calls = {name: functools.partial(sk.allocation_map, mass, grid, backend=key) for name, key in names.items()}
    what = f"allocation map, B {batch}, {grid[0]} x {grid[1]} tokens, K 8"
    _measure(report, what, calls, cases.total_bytes(mass, mass[..., 0]))


def _measure(report: Report, name: str, calls: Mapping[str, Callable[[], object]], moved: int) -> None:
    """Time the members, and a copy that reads and writes as many bytes as have to move: nothing is faster."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=report.device)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    named: dict[str, Callable[[], object]] = {**calls, "copy of as many bytes": copy}
    members = [Member(key, call, baseline=key == "eager", work={"GB": moved / 1e9}) for key, call in named.items()]
    report.measure(name, members, budget=1.5)
