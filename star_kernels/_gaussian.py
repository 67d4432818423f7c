"""The Gaussian transition with a linear mean that `transition` and `policy_loss` share (docs/method.md, section 2).

It stands outside both folders because operators do not import each other, and because a ratio is exactly 1
on policy only if the rollout and the loss compute a log-prob with the same operations in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ._checks import check_number, check_tensor

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class TransitionCoefficients:
    """The scalars of x' = a·x + b·v + s·ε, one row per sample, or a single row that serves every sample.

    Attributes:
        sample_drift: a − 1, [B] or [1]. Kept in place of a because the log-prob looks at x' − μ in units of s: near the
            end of a schedule s is about 1e-3, x' is close to x, and the rounding of a to float32 alone would move
            x' − μ by 1e-5 of it.
        velocity_scale: b, [B] or [1].
        std: s, [B] or [1].
        noise_rate: q with s = q·√(σ − σ'), [B] or [1], for the kinds that have one, else None.
        kind: where the coefficients come from, for messages.
        stochastic: whether s > 0, kept beside the tensors so that no operator has to read s back from a GPU.
    """

    sample_drift: Tensor
    velocity_scale: Tensor
    std: Tensor
    noise_rate: Tensor | None = None
    kind: str = "custom"
    stochastic: bool = True
    # Batches and devices that the rows have been found to fit, without a copy.
    _fit: set[tuple[int, torch.device]] = field(default_factory=set, init=False, repr=False)

    @property
    def sample_scale(self) -> Tensor:
        """a, [B] or [1]."""
        return 1 + self.sample_drift

    def to(self, device: torch.device | str) -> TransitionCoefficients:
        """The same coefficients on another device."""
        return self._map(lambda row: row.to(device))

    def __getitem__(self, rows: slice | Tensor) -> TransitionCoefficients:
        """The coefficients of some of the samples; a single row, which serves every sample, stays as it is."""
        return self._map(lambda row: row if row.shape == (1,) else row[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> TransitionCoefficients:
        return replace(
            self,
            sample_drift=change(self.sample_drift),
            velocity_scale=change(self.velocity_scale),
            std=change(self.std),
            noise_rate=None if self.noise_rate is None else change(self.noise_rate),
        )


_ROWS = ("coefficients.sample_drift", "coefficients.velocity_scale", "coefficients.std", "coefficients.noise_rate")


def check_coefficients(coefficients: object, batch: int, device: torch.device) -> TransitionCoefficients:
    """`coefficients`, after checking the types, shapes and devices of their rows.

    Single rows may be on the CPU wherever the latents are: a GPU gets their numbers by value. Several that are on the
    CPU are copied to `device`, which cannot be captured in a graph. Any other device is an error.
    """
    if not isinstance(coefficients, TransitionCoefficients):
        raise TypeError(
            f"coefficients: expected TransitionCoefficients (see transition_coefficients), "
            f"got {type(coefficients).__name__}"
        )
    is_eager = not torch.compiler.is_compiling()
    if is_eager and (batch, device) in coefficients._fit:
        return coefficients
    rows = (coefficients.sample_drift, coefficients.velocity_scale, coefficients.std, coefficients.noise_rate)
    on_cpu = several = 0
    for name, row in zip(_ROWS, rows, strict=True):
        if row is None and name == "coefficients.noise_rate":
            continue
        single = isinstance(row, Tensor) and row.shape == (1,)
        here = isinstance(row, Tensor) and row.is_cpu
        check_tensor(name, row, (1 if single else batch,), device=None if here else device)
        on_cpu += here
        several += not (here and single)
    if device.type == "cpu" or not (on_cpu and several):
        if is_eager:
            coefficients._fit.add((batch, device))
        return coefficients
    if is_eager and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"coefficients: expected tensors on {device}, or one row for all samples, while a graph is captured, got "
            f"{batch} rows on the CPU; coefficients.to(device) copies them"
        )
    return coefficients.to(device)


def check_guidance(velocity: Tensor, unconditional_velocity: object, guidance_scale: object) -> float:
    """The guidance scale, after checking it and the unconditional velocity against each other."""
    scale = check_number("guidance_scale", guidance_scale, low=0.0)
    if unconditional_velocity is not None:
        check_tensor("unconditional_velocity", unconditional_velocity, velocity.shape, device=velocity.device)
    elif scale != 1.0:
        raise ValueError(
            f"unconditional_velocity: expected a tensor {list(velocity.shape)} "
            f"because guidance_scale is {scale}, got None"
        )
    return scale


def compute_dtype(*values: Tensor | float | None) -> torch.dtype:
    """float64 when every floating tensor is float64, so that gradients can be checked; float32 otherwise.

    A number is one that came from float32.
    """
    dtypes = {
        value.dtype if isinstance(value, Tensor) else torch.float32
        for value in values
        if not (value is None or (isinstance(value, Tensor) and not value.is_floating_point()))
    }
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def per_sample(scalars: Tensor, dtype: torch.dtype, dimensions: int = 3) -> Tensor:
    """[B] scalars shaped [B, 1, 1, 1], or with as many dimensions after B; one for all is [], also from the CPU."""
    return scalars.to(dtype).reshape(() if scalars.shape == (1,) else (-1,) + (1,) * dimensions)


def guided_velocity(velocity: Tensor, unconditional_velocity: Tensor | None, guidance_scale: float) -> Tensor:
    """v = v_u + g·(v_c − v_u), or v_c where there is no v_u."""
    if unconditional_velocity is None:
        return velocity
    return unconditional_velocity + guidance_scale * (velocity - unconditional_velocity)


def transition_shift(velocity: Tensor, sample: Tensor, sample_drift: Tensor, velocity_scale: Tensor) -> Tensor:
    """μ − x = (a−1)·x + b·v, with the scalars as [B] or [1] and everything else [B, C, H, W] in one dtype."""
    return per_sample(sample_drift, sample.dtype) * sample + per_sample(velocity_scale, sample.dtype) * velocity


def mean_deviation(next_sample: Tensor, sample: Tensor, shift: Tensor) -> Tensor:
    """x' − μ. The two latents are subtracted first: they are close where s is small, so that hardly a digit is lost."""
    return (next_sample - sample) - shift


def channel_sum(values: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W]. Contiguous first, so that the memory format does not change the order of the sum."""
    return values.contiguous().sum(1)


def log_prob(deviation: Tensor, std: Tensor) -> Tensor:
    """logp_i [B, H, W] of the deviation x' − μ [B, C, H, W] under the standard deviation s [B], the channel mean."""
    std = per_sample(std, deviation.dtype, 2)
    scale = -1.0 / (2.0 * deviation.shape[1] * std * std)
    offset = -torch.log(std) - HALF_LOG_TWO_PI
    return channel_sum(deviation * deviation) * scale + offset
