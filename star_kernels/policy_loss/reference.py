"""The spatially resolved objective in plain PyTorch (docs/method.md, section 5).

`policy_loss` is the definition; autograd can differentiate it with respect to the velocity. Its gradient is simple
enough to write down, and `policy_loss_and_gradient` does so from the same intermediate values.

Arithmetic is in float32, or in float64 when every floating argument is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._gaussian import (
    TransitionCoefficients,
    channel_sum,
    compute_dtype,
    guided_velocity,
    log_prob,
    mean_deviation,
    per_sample,
    transition_shift,
)

METRICS = (
    "policy_loss",
    "kl",
    "clip_fraction",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "non_finite",
    "divergence",
)
OBJECTIVES = ("clip", "none", "guard", "dppo")
# A clip range that holds every ratio, also times the root of a mean squared weight that is very small.
NO_CLIP_RANGE = 1e30
LOG_RATIO_LIMIT = 20.0
# Of an advantage times a weight: with the largest ratio, the sum over 2^35 positions is still a float32.
WEIGHTED_ADVANTAGE_LIMIT = 2.0**64


class Inputs(NamedTuple):
    """The arguments of `star_kernels.policy_loss`, in its order, as it has checked and completed them."""

    velocity: Tensor  # [B, C, H, W]
    sample: Tensor  # [B, C, H, W]
    next_sample: Tensor  # [B, C, H, W]
    old_log_prob: Tensor  # [B, H, W]
    advantage: Tensor  # [B]
    coefficients: TransitionCoefficients
    weights: Tensor | None = None  # [B, h, w]
    mask: Tensor | None = None  # [B, H, W] bool
    objective: str = "clip"
    old_velocity: Tensor | None = None  # [B, C, H, W], guidance applied
    clip_range: Sequence[float] = (1e-4, 1e-4)
    divergence_limit: float = 0.0  # of dppo
    granularity: str = "position"
    reference_velocity: Tensor | None = None  # [B, C, H, W]
    kl_weight: float = 0.0
    kl_scale: str = "variance"
    unconditional_velocity: Tensor | None = None  # [B, C, H, W]
    guidance_scale: float = 1.0

    def bounds(self) -> Sequence[float]:
        """ε_low and ε_high; those of an objective that does not clip hold every ratio."""
        return self.clip_range if self.objective in ("clip", "guard") else (NO_CLIP_RANGE, NO_CLIP_RANGE)

    def kl_std(self) -> Tensor:
        """[B] or [1]: the KL is divided by twice its square."""
        c = self.coefficients
        if self.kl_scale == "velocity":
            # Means differ by b times what velocities differ by, and the KL is divided by twice the square of this.
            return c.velocity_scale.abs() * math.sqrt(0.5)
        return c.std if self.kl_scale == "variance" or c.noise_rate is None else c.noise_rate

    def flat(self) -> tuple[Any, ...]:
        """The arguments as operators take them: the rows of the coefficients in their place."""
        c = self.coefficients
        return (*self[:5], c.sample_drift, c.velocity_scale, c.std, c.noise_rate, *self[6:])

    @classmethod
    def from_flat(cls, arguments: Sequence[Any]) -> Inputs:
        return cls._make((*arguments[:5], TransitionCoefficients(*arguments[5:9]), *arguments[9:]))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the coefficients."""
        return (*self[:5], *self[6:8], self.old_velocity, self.reference_velocity, self.unconditional_velocity)

    def latents(self) -> tuple[Tensor | None, ...]:
        """All that are like the velocity, which is the first."""
        return tuple(getattr(self, name) for name in LATENTS)

    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic and of the results."""
        c = self.coefficients
        tensors = (*self.latents(), self.old_log_prob, self.advantage, self.weights)
        return compute_dtype(*tensors, c.sample_drift, c.velocity_scale, c.std, self.kl_std())


LATENTS = ("velocity", "sample", "next_sample", "reference_velocity", "unconditional_velocity", "old_velocity")


def empty_gradient(velocity: Tensor, dtype: torch.dtype) -> Tensor:
    """What the gradient is kept in until backward, for arithmetic in `dtype`.

    Its dtype is the velocity's if that is bfloat16, but not if it is float16: a loss scale is applied in backward, and
    before that the gradient of one of many positions is below what float16 can hold. It lies in memory as the velocity
    does where that is contiguous or channels_last, or else autograd would copy the gradient of a leaf; otherwise it is
    contiguous.
    """
    last = not velocity.is_contiguous() and velocity.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(
        velocity,
        dtype=velocity.dtype if velocity.dtype == torch.bfloat16 else dtype,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


class _Terms(NamedTuple):
    """What the loss and its gradient are both made of."""

    loss: Tensor  # []
    metrics: Tensor  # [len(METRICS)]
    counted: Tensor  # [B, H, W], positions that are valid and finite
    share: Tensor  # [B], 1 / number of valid positions
    pull: Tensor  # [B, H, W], −∂(weighted policy term)/∂(log-ratio), before `counted` and `share`
    deviation: Tensor  # [B, C, H, W], x' − μ, or x' − μ_old for guard
    drift: Tensor | None  # [B, C, H, W], μ − μ_ref


def policy_loss(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The loss [] and its metrics [9], in the order of METRICS."""
    terms = _terms(inputs)
    return terms.loss, terms.metrics


def policy_loss_and_gradient(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The loss [], its metrics [9] and its gradient with respect to the velocity [B, C, H, W].

    ∂loss/∂v_c = g·b·(1/B)·(m_i/Σm)·(1/C)·[ pull_i·(x'−μ)/s² + β·(μ−μ_ref)/kl_std² ], where pull_i is
    w_i·(−A·ρ_i) while the unclipped branch is active and the log-ratio is inside its clamp, else 0. At image
    granularity the ratio and its branch are the image's. With guard (x'−μ_old)/s takes the place of (x'−μ)/s².
    """
    terms, c = _terms(inputs), inputs.coefficients
    dtype = terms.deviation.dtype
    batch, channels = inputs.velocity.shape[:2]
    power = 1 if inputs.objective == "guard" else 2
    grad_mean = (terms.pull / per_sample(c.std, dtype, 2) ** power)[:, None] * terms.deviation
    if terms.drift is not None and inputs.kl_weight > 0:
        grad_mean = grad_mean + (inputs.kl_weight / per_sample(inputs.kl_std(), dtype) ** 2) * terms.drift
    share = per_sample(terms.share, dtype)
    scale = inputs.guidance_scale * per_sample(c.velocity_scale, dtype) * share / (batch * channels)
    # A product would not do: zero times a deviation that is NaN is NaN.
    grad_velocity = torch.where(terms.counted[:, None], scale * grad_mean, 0.0)
    return terms.loss, terms.metrics, grad_velocity


def _terms(inputs: Inputs) -> _Terms:
    dtype, c = inputs.dtype(), inputs.coefficients
    batch, channels, height, width = inputs.velocity.shape
    x, advantage = inputs.sample.to(dtype), inputs.advantage.to(dtype)
    unconditional = None if inputs.unconditional_velocity is None else inputs.unconditional_velocity.to(dtype)
    velocity = guided_velocity(inputs.velocity.to(dtype), unconditional, inputs.guidance_scale)
    std = per_sample(c.std, dtype, 2)
    old_velocity = None if inputs.old_velocity is None else inputs.old_velocity.to(dtype)
    compared = old_velocity if inputs.objective == "guard" and old_velocity is not None else velocity
    shift = transition_shift(compared, x, c.sample_drift, c.velocity_scale)
    deviation = mean_deviation(inputs.next_sample.to(dtype), x, shift)
    move = None if old_velocity is None else per_sample(c.velocity_scale, dtype) * (velocity - old_velocity)
    if move is not None and inputs.objective == "guard":
        log_ratio = channel_sum(deviation * move) / (channels * std)  # [B, H, W]
    else:
        log_ratio = log_prob(deviation, c.std) - inputs.old_log_prob.to(dtype)
    divergence = torch.zeros_like(log_ratio) if move is None else channel_sum(move * move) / (2 * channels * std**2)

    if inputs.reference_velocity is None:
        drift, kl = None, torch.zeros_like(log_ratio)
    else:
        # Both means start from the same x, so only the velocities differ.
        drift = per_sample(c.velocity_scale, dtype) * (velocity - inputs.reference_velocity.to(dtype))
        kl = channel_sum(drift * drift) / (2 * channels * per_sample(inputs.kl_std(), dtype, 2) ** 2)

    if inputs.weights is None:
        weight = torch.ones_like(log_ratio)
    else:
        weight = _on_latent_grid(inputs.weights.to(dtype), height, width)
    valid = torch.ones_like(log_ratio, dtype=torch.bool) if inputs.mask is None else inputs.mask
    bounded = (advantage[:, None, None] * weight).abs() < WEIGHTED_ADVANTAGE_LIMIT
    finite = log_ratio.isfinite() & kl.isfinite() & divergence.isfinite() & bounded
    counted = valid & finite
    # A sample without a valid position has only zero terms; 1 keeps them from becoming 0/0.
    share = 1 / valid.sum((1, 2)).clamp(min=1).to(dtype)  # [B]
    log_ratio = torch.where(counted, log_ratio, 0.0)
    weight = torch.where(counted, weight, 0.0)
    kl = torch.where(counted, kl, 0.0)
    divergence = torch.where(counted, divergence, 0.0)

    inside = log_ratio.abs() <= LOG_RATIO_LIMIT  # where the clamp does not act
    clamped = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    clip_low, clip_high = inputs.bounds()
    low: Any = 1 - clip_low
    high: Any = 1 + clip_high
    if inputs.granularity == "image":
        log_ratio, squares = _position_sums(weight * clamped, weight * weight).unbind(1)  # [B] each
        log_ratio = log_ratio * share
        number = counted.sum((1, 2))
        included = (number > 0) & log_ratio.isfinite() & squares.isfinite()
        counted = counted & included[:, None, None]
        kl, divergence = torch.where(counted, kl, 0.0), torch.where(counted, divergence, 0.0)
        log_ratio = torch.where(included, log_ratio, 0.0)
        inside = inside & (log_ratio.abs() <= LOG_RATIO_LIMIT)[:, None, None]
        clamped = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        # In double precision, so that weights of 1 leave the bounds as they are.
        spread = torch.where(included, squares.double() / number, 1.0).sqrt()
        low, high = (1 - clip_low * spread).to(dtype), (1 + clip_high * spread).to(dtype)
    else:
        advantage, included = advantage[:, None, None], counted
    advantage = torch.where(included, advantage, 0.0)

    ratio = clamped.exp()
    unclipped = -advantage * ratio
    divergence_by_sample = torch.zeros_like(share) if move is None else _position_sums(divergence, kl)[:, 0] * share
    if inputs.objective == "dppo":
        outward = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
        moved = divergence_by_sample if inputs.granularity == "image" else divergence
        outside = outward & (moved >= inputs.divergence_limit)
        policy = torch.where(outside, 0.0, unclipped)
        slope = policy
    else:
        outside = (ratio < low) | (ratio > high)
        policy = torch.maximum(unclipped, -advantage * ratio.clamp(low, high))
        slope = torch.where(unclipped >= policy, unclipped, 0.0)

    if inputs.granularity == "image":
        slope = slope[:, None, None]
        policy_by_sample, kl_by_sample = policy, _position_sums(kl, kl)[:, 0] * share
    else:
        policy_by_sample, kl_by_sample = (_position_sums(weight * policy, kl) * share[:, None]).unbind(1)
    pull = weight * torch.where(inside, slope, 0.0)
    policy_mean, kl_mean = policy_by_sample.sum() / batch, kl_by_sample.sum() / batch
    loss = policy_mean + inputs.kl_weight * kl_mean

    number = included.sum()
    divisor = number.clamp(min=1).to(dtype)
    metrics = {
        "policy_loss": policy_mean,
        "kl": kl_mean,
        "clip_fraction": (included & outside).sum() / divisor,
        "ratio_mean": torch.where(number > 0, torch.where(included, ratio, 0.0).sum() / divisor, 1.0),
        "ratio_min": torch.where(number > 0, torch.where(included, ratio, torch.inf).min(), 1.0),
        "ratio_max": torch.where(number > 0, torch.where(included, ratio, -torch.inf).max(), 1.0),
        "approx_kl": torch.where(included, clamped * clamped, 0.0).sum() / (2 * divisor),
        "non_finite": (valid & ~counted).sum().to(dtype),
        "divergence": divergence_by_sample.sum() / batch,
    }
    stacked = torch.stack([metrics[name] for name in METRICS]).detach()
    return _Terms(loss, stacked, counted, share, pull, deviation, drift)


def _on_latent_grid(weights: Tensor, height: int, width: int) -> Tensor:
    """[B, h, w] -> [B, H, W], each position reading its token's weight."""
    batch, rows, columns = weights.shape
    tiled = weights[:, :, None, :, None].expand(batch, rows, height // rows, columns, width // columns)
    return tiled.reshape(batch, height, width)


def _position_sums(first: Tensor, second: Tensor) -> Tensor:
    """Sums over positions of two [B, H, W] tensors, [B, 2].

    Two at a time, because PyTorch splits a reduction to one single number among threads: a sample alone would then
    differ in the last bits from the same sample in a batch.
    """
    return torch.stack((first, second), 1).flatten(2).sum(2)
