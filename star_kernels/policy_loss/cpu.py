"""The call into csrc/policy_loss.cpp."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from .._gaussian import TransitionCoefficients
from . import reference


def supports(inputs: reference.Inputs) -> bool:
    """Whether the kernel reads these latents: it has no float64."""
    latents = (
        inputs.velocity,
        inputs.sample,
        inputs.next_sample,
        inputs.reference_velocity,
        inputs.unconditional_velocity,
    )
    return not any(latent is not None and latent.dtype == torch.float64 for latent in latents)


def policy_loss(inputs: reference.Inputs, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], metrics [8], and the gradient in `inputs.gradient_dtype()` or, unasked for, [0].

    Autograd knows the loss's gradient with respect to the velocity: csrc/policy_loss_autograd.cpp.
    """
    *tensors, clip_low, clip_high, granularity, kl_weight, guidance_scale = inputs
    return torch.ops.star_kernels_cpu.policy_loss(
        *tensors, clip_low, clip_high, granularity == "image", kl_weight, guidance_scale, with_gradient
    )


def plain_policy_loss(
    velocity: Tensor,
    sample: Tensor,
    next_sample: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    coefficients: TransitionCoefficients,
    weights: object,
    mask: object,
    clip_range: object,
    granularity: object,
    reference_velocity: object,
    kl_weight: object,
    kl_scale: object,
    unconditional_velocity: object,
    guidance_scale: object,
) -> tuple[Tensor, ...] | None:
    """Loss and metrics of arguments as the public function takes them, checked in C++: csrc/policy_loss_python.cpp.

    None, and nothing done, for what is wrong with them or has to be converted first.
    """
    output = _extension().plain_policy_loss(
        velocity,
        sample,
        next_sample,
        old_log_prob,
        advantage,
        coefficients,
        weights,
        mask,
        clip_range,
        granularity,
        reference_velocity,
        kl_weight,
        kl_scale,
        unconditional_velocity,
        guidance_scale,
    )
    return cast("tuple[Tensor, ...] | None", output)


@functools.cache
def _extension() -> ModuleType:
    return importlib.import_module("star_kernels._C")
