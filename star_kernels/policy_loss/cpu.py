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
    latents = (
        inputs.velocity,
        inputs.sample,
        inputs.next_sample,
        inputs.reference_velocity,
        inputs.unconditional_velocity,
        inputs.old_velocity,
    )
    return not any(latent is not None and latent.dtype == torch.float64 for latent in latents)


def policy_loss(inputs: reference.Inputs, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], metrics [9], and the gradient in `inputs.gradient_dtype()` or, unasked for, [0].

    Autograd knows the loss's gradient with respect to the velocity: csrc/policy_loss_autograd.cpp.
    """
    arguments = inputs._asdict()
    arguments["objective"] = reference.OBJECTIVES.index(inputs.objective)
    arguments["granularity"] = inputs.granularity == "image"
    return torch.ops.star_kernels_cpu.policy_loss(*arguments.values(), with_gradient)


def plain_policy_loss(*arguments: object) -> tuple[Tensor, ...] | None:
    """Loss and metrics (scalars) of what the public function takes, in its order without `backend`, checked in C++.

    See csrc/policy_loss_python.cpp. None, and nothing done, for what is wrong or has to be converted first.
    """
    output = _extension().plain_policy_loss(*arguments)
    return cast("tuple[Tensor, ...] | None", output)


@functools.cache
def _extension() -> ModuleType:
    return importlib.import_module("star_kernels._C")
