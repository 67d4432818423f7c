"""The scalars (a, b, s) of each sampler from its schedule (docs/method.md, section 2); a − 1 stands for a."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_choice, check_number, check_tensor
from .._gaussian import TransitionCoefficients

KINDS = ("flow_sde", "dance_sde", "cps", "ode", "ddim")


def transition_coefficients(
    kind: str,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    eta: Tensor | float = 0.7,
    sigma_max: Tensor | float | None = None,
) -> TransitionCoefficients:
    """Coefficients of one step of a sampler, x' = a·x + b·v + s·ε (docs/method.md, section 2).

    Kinds: ``flow_sde`` (Flow-GRPO), ``dance_sde`` (DanceGRPO), ``cps`` (coefficient-preserving sampling), ``ode``
    (Euler, no noise), ``ddim`` (models that predict noise: `velocity` is then the predicted noise, and `sigma` and
    `sigma_next` hold ᾱ and ᾱ').

    The arithmetic is done in float64 and rounded once: differences such as 1 − σ, σ' − σ and 1 − ᾱ/ᾱ' lose digits
    near the ends of a schedule, and both the log-prob and its gradient divide by s².

    Args:
        kind: one of the kinds above.
        sigma: noise level of the current sample, [B], or a number or 0-d tensor for all samples. In (0, 1];
            for ddim ᾱ, in (0, 1).
        sigma_next: noise level of the next sample, same forms. In [0, sigma); for ddim ᾱ', in (sigma, 1].
        eta: how much noise is added, same forms. At least 0; at most 1 for cps and ddim. Not used by ode.
        sigma_max: the schedule's second noise level, in (0, 1): flow_sde divides by 1 − σ, and takes this value where
            σ is 1. A number or a tensor like `sigma`; not used by the other kinds.

    Returns:
        TransitionCoefficients of [B] tensors ([1] when every level is a number or 0-d) on the device of the levels:
        float64 when the levels are float64 tensors, else float32. `noise_rate` is q for the two SDE kinds and None for
        the others.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an unknown kind, a level or `eta` outside its range, `sigma_next` on the wrong side of `sigma`, a
            missing `sigma_max`, shapes or devices that disagree, or a batch in which only some rows have noise. Values
            on a GPU, or while torch.compile traces, are not checked: that would wait for the device. Such coefficients
            also count as stochastic unless `eta` is the number 0, even where a last cps or ddim step has s = 0.
    """
    check_choice("kind", kind, KINDS)
    largest_eta = 1.0 if kind in ("cps", "ddim") else None
    given = {"sigma": sigma, "sigma_next": sigma_next}
    if sigma_max is not None:
        given["sigma_max"] = sigma_max
    for name, level in given.items():
        if not isinstance(level, torch.Tensor):
            check_number(name, level, low=0.0, high=1.0)
    if not isinstance(eta, torch.Tensor):
        check_number("eta", eta, low=0.0, high=largest_eta)
    rows = _float64_rows(given | {"eta": eta})
    now, after, second, etas = rows["sigma"], rows["sigma_next"], rows.get("sigma_max"), rows["eta"]
    readable = now.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable:
        _check_levels(kind, now, after, second)
        _check_etas(etas, largest_eta)

    noise_rate = None
    if kind == "ddim":
        drift, b, std = _ddim(now, after, etas)
    elif kind == "cps":
        drift, b, std = _cps(now, after, etas)
    else:
        if kind == "flow_sde":
            capped = now if second is None else torch.where(now == 1, second, now)
            noise_rate = etas * torch.sqrt(now / (1 - capped))
        elif kind == "dance_sde":
            noise_rate = etas
        rate = torch.zeros_like(now) if noise_rate is None else noise_rate
        drift, b, std = _euler_maruyama(now, after, rate)

    stochastic = kind != "ode" and (isinstance(eta, torch.Tensor) or eta > 0)
    if readable and stochastic:
        noisy = int((std > 0).sum())
        if 0 < noisy < std.numel():
            raise ValueError(
                f"sigma_next: expected steps with noise in all rows or in none, got it in {noisy} of {std.numel()}"
            )
        stochastic = noisy > 0

    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    dtype = torch.float64 if tensors and all(value.dtype == torch.float64 for value in tensors) else torch.float32
    return TransitionCoefficients(
        sample_drift=drift.to(dtype),
        velocity_scale=b.to(dtype),
        std=std.to(dtype),
        noise_rate=None if noise_rate is None else noise_rate.to(dtype),
        kind=kind,
        stochastic=stochastic,
    )


def _euler_maruyama(sigma: Tensor, sigma_next: Tensor, noise_rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of dx = [v + q²/(2σ)·(x + (1−σ)v)] dσ + q dw: the ODE, corrected for the noise that is added.

    The velocity gives the score, −(x + (1−σ)v)/σ. With q = 0 this is Euler's step of the ODE.
    """
    dt = sigma_next - sigma
    correction = noise_rate**2 / (2 * sigma)
    return correction * dt, (1 + correction * (1 - sigma)) * dt, noise_rate * torch.sqrt(-dt)


def _cps(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1−σ')·x̂₀ + √(σ'²−s²)·x̂₁ + s·ε with x̂₀ = x − σv and x̂₁ = x + (1−σ)v, so that the noise level is σ' exactly."""
    angle = eta * math.pi / 2
    kept = sigma_next * torch.cos(angle)
    drift = -2 * sigma_next * torch.sin(angle / 2) ** 2  # (1−σ') + σ'·cos − 1, without the cancellation
    return drift, (1 - sigma) * kept - sigma * (1 - sigma_next), sigma_next * torch.sin(angle)


def _ddim(alpha_bar: Tensor, alpha_bar_next: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """√ᾱ'·x̂₀ + √(1−ᾱ'−s²)·v + s·ε with x̂₀ = (x − √(1−ᾱ)·v)/√ᾱ, where v is the predicted noise."""
    noise, noise_next = 1 - alpha_bar, 1 - alpha_bar_next
    variance = eta**2 * (noise_next / noise) * ((alpha_bar_next - alpha_bar) / alpha_bar_next)
    # 1−ᾱ'−s² is at least 0 for eta ≤ 1; the clamp only keeps rounding from making it −1e-17 where it is 0.
    direction = torch.sqrt((noise_next - variance).clamp(min=0))
    a = torch.sqrt(alpha_bar_next / alpha_bar)
    return a - 1, direction - a * torch.sqrt(noise), torch.sqrt(variance)


def _float64_rows(given: dict[str, Tensor | float]) -> dict[str, Tensor]:
    """Levels and eta as float64 tensors of one length on one device; numbers and 0-d tensors follow the others."""
    rows = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    length: int | str = "B"
    device = None
    for name, row in rows.items():
        length = check_tensor(name, row, (length,), device=device).shape[0]
        device = row.device
    for name, value in given.items():
        if name in rows or not isinstance(value, torch.Tensor):
            continue
        if value.device.type == "cpu":
            check_tensor(name, value, ())
        else:
            device = check_tensor(name, value, (), device=device).device
    size = length if isinstance(length, int) else 1
    device = device or torch.device("cpu")
    return {
        name: (
            value.detach().to(device=device, dtype=torch.float64, non_blocking=True).expand(size)
            if isinstance(value, torch.Tensor)
            else torch.full((size,), float(value), dtype=torch.float64, device=device)
        )
        for name, value in given.items()
    }


def _require(name: str, holds: Tensor, expected: str, came: Tensor) -> None:
    if not bool(holds.all()):
        raise ValueError(f"{name}: expected {expected}, got {came[~holds][0].item()}")


def _check_etas(etas: Tensor, largest: float | None) -> None:
    if largest is None:
        _require("eta", (etas >= 0) & etas.isfinite(), "finite numbers of at least 0", etas)
    else:
        _require("eta", (etas >= 0) & (etas <= largest), f"numbers in [0, {largest}]", etas)


def _check_levels(kind: str, now: Tensor, after: Tensor, second: Tensor | None) -> None:
    if kind == "ddim":
        _require("sigma", (now > 0) & (now < 1), "cumulative alphas in (0, 1) for ddim", now)
        _require("sigma_next", (after >= 0) & (after <= 1), "cumulative alphas in [0, 1] for ddim", after)
        _require("sigma_next", after > now, "cumulative alphas above sigma (they grow towards the image)", after)
        return
    _require("sigma", (now > 0) & (now <= 1), "noise levels in (0, 1]", now)
    _require("sigma_next", (after >= 0) & (after <= 1), "noise levels in [0, 1]", after)
    _require("sigma_next", after < now, "noise levels below sigma (they fall towards the image)", after)
    if kind != "flow_sde":
        return
    if second is not None:
        _require("sigma_max", (second > 0) & (second < 1), "the schedule's second noise level, in (0, 1)", second)
    elif bool((now == 1).any()):
        raise ValueError("sigma_max: expected the schedule's second noise level because sigma is 1, got None")
