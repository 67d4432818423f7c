"""The call into csrc/policy_loss.cpp."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from . import reference


def supports(inputs: reference.Inputs) -> bool:
    """Whether the kernel reads these latents: it has no float64."""
    return not any(latent is not None and latent.dtype == torch.float64 for latent in inputs.latents())


def policy_loss(inputs: reference.Inputs, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], metrics [9], and the gradient as `reference.empty_gradient` has it or, unasked for, [0].

    Autograd knows the loss's gradient with respect to the velocity: csrc/policy_loss_autograd.cpp.
    """
    c, batch = inputs.coefficients, len(inputs.velocity)
    return torch.ops.star_kernels_cpu.policy_loss(
        *inputs[:5],
        *(row.expand(batch) for row in (c.sample_drift, c.velocity_scale, c.std, inputs.kl_std())),
        inputs.weights,
        inputs.mask,
        *inputs.latents()[3:],
        *inputs.clip_range,
        reference.OBJECTIVES.index(inputs.objective),
        inputs.divergence_limit,
        inputs.granularity == "image",
        inputs.kl_weight,
        inputs.guidance_scale,
        with_gradient,
    )


def plain_policy_loss(*arguments: object) -> tuple[Tensor, ...] | None:
    """Loss and metrics (scalars) of what the public function takes, in its order without `backend`, checked in C++.

    See csrc/policy_loss_python.cpp. None, and nothing done, for what is wrong or has to be converted first.
    """
    output = _extension().plain_policy_loss(*arguments)
    return cast("tuple[Tensor, ...] | None", output)


@functools.cache
def _extension() -> ModuleType:
    return importlib.import_module("star_kernels._C")
