"""How clean latents and noise are mixed at a noise level, and the steps between levels that follow from it."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

import star_kernels as sk
from star_kernels import TransitionCoefficients


class Noising(Protocol):
    """What a family's noise levels mean: the trainer asks this, and never what its model predicts.

    A level is σ where models predict a velocity and ᾱ where they predict noise (docs/method.md, section 2); x̂₀ are the
    clean latents and ε̂ the noise that a prediction stands for.
    """

    @property
    def samplers(self) -> tuple[str, ...]:
        """The values of ``rollout.sampler`` that step between such levels."""

    @property
    def symbol(self) -> str:
        """Of a level, in pictures."""

    def step(
        self, kind: str, level: Tensor, following: Tensor, *, eta: float, second: Tensor | None = None
    ) -> TransitionCoefficients:
        """A step of one of `samplers`, or the step without noise of diffusers' pipelines (the kind ``ode``).

        `second` is the schedule's second level.
        """

    def renoised(self, level: Tensor, following: Tensor, share: Tensor) -> TransitionCoefficients:
        """The step to x̂₀ at the following level, `share` [B] in [0, 1] of whose noise is new and the rest ε̂."""

    def to_clean(self, level: Tensor) -> TransitionCoefficients:
        """The step from a level (0-d or [B]) to x̂₀."""

    def level_of(self, sigma: Tensor) -> Tensor:
        """The levels at which noise is to clean latents as σ is to 1 − σ."""

    def mixed(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Clean latents [B, C, H, W] with noise at levels [B]."""


class _Flow:
    """Flow matching: x = (1 − σ)·x₀ + σ·ε, and models predict ε − x₀."""

    samplers = ("flow_sde", "dance_sde", "cps")
    symbol = "σ"

    def step(
        self, kind: str, level: Tensor, following: Tensor, *, eta: float, second: Tensor | None = None
    ) -> TransitionCoefficients:
        return sk.transition_coefficients(kind, level, following, eta=eta, sigma_max=second)

    def renoised(self, level: Tensor, following: Tensor, share: Tensor) -> TransitionCoefficients:
        # A step of this kind takes the sine of eta's right angles for the share of new noise.
        return sk.transition_coefficients("cps", level, following, eta=torch.asin(share) * (2 / math.pi))

    def to_clean(self, level: Tensor) -> TransitionCoefficients:
        return sk.transition_coefficients("ode", level, 0.0)

    def level_of(self, sigma: Tensor) -> Tensor:
        return sigma

    def mixed(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        levels = level.view(-1, 1, 1, 1)
        return (1 - levels) * clean + levels * noise


class _Diffusion:
    """Denoising diffusion: x = √ᾱ·x₀ + √(1 − ᾱ)·ε, and models predict ε."""

    samplers = ("ddim",)
    symbol = "ᾱ"

    def step(
        self, kind: str, level: Tensor, following: Tensor, *, eta: float, second: Tensor | None = None
    ) -> TransitionCoefficients:
        return sk.transition_coefficients("ddim", level, following, eta=0.0 if kind == "ode" else eta)

    def renoised(self, level: Tensor, following: Tensor, share: Tensor) -> TransitionCoefficients:
        # Not the kind ddim, whose eta of 1 renews only as much noise as the forward process would have between levels.
        now, after, renewed = level.double(), following.double(), share.double()
        noise = (1 - after).sqrt()
        scale = (after / now).sqrt()
        std = renewed * noise
        return TransitionCoefficients(
            sample_drift=(scale - 1).expand_as(std).float(),
            velocity_scale=((1 - renewed**2).sqrt() * noise - scale * (1 - now).sqrt()).float(),
            std=std.float(),
            kind="renoised",
            stochastic=bool((std > 0).any()),
        )

    def to_clean(self, level: Tensor) -> TransitionCoefficients:
        return sk.transition_coefficients("ddim", level, 1.0, eta=0.0)

    def level_of(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + (sigma / (1 - sigma)).square())

    def mixed(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        levels = level.view(-1, 1, 1, 1)
        return levels.sqrt() * clean + (1 - levels).sqrt() * noise


FLOW: Noising = _Flow()
DIFFUSION: Noising = _Diffusion()
