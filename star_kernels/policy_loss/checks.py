"""The checks of the policy loss's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import FLOATS, check_choice, check_number, check_tensor
from .._gaussian import check_coefficients, check_guidance
from .clip_range import check_clip_range
from .reference import OBJECTIVES, Inputs

GRANULARITIES = ("position", "image")
KL_SCALES = ("variance", "std_dev", "velocity")


def with_rows(inputs: Inputs) -> Inputs:
    """With coefficients that are checked, and where they have to be."""
    if not isinstance(inputs.velocity, Tensor) or inputs.velocity.dim() != 4 or not len(inputs.velocity):
        check_tensor("velocity", inputs.velocity, ("B", "C", "H", "W"))
    rows = check_coefficients(inputs.coefficients, len(inputs.velocity), inputs.velocity.device)
    if not rows.stochastic:
        raise ValueError(f"coefficients: expected steps with noise, got {rows.kind} with s = 0, which has no log-prob")
    if inputs.kl_scale == "std_dev" and rows.noise_rate is None:
        raise ValueError(f"kl_scale: expected 'variance' because {rows.kind} steps have no noise rate, got 'std_dev'")
    return inputs if rows is inputs.coefficients else inputs._replace(coefficients=rows)


def checked(inputs: Inputs) -> Inputs:
    """All but the coefficients checked: with a bool mask, two bounds of the clip range, and floats."""
    velocity, objective, weights, mask = inputs.velocity, inputs.objective, inputs.weights, inputs.mask
    batch, _, height, width = velocity.shape
    device = velocity.device
    check_tensor("velocity", velocity, ("B", "C", "H", "W"))
    check_tensor("sample", inputs.sample, velocity.shape, device=device)
    check_tensor("next_sample", inputs.next_sample, velocity.shape, device=device)
    check_tensor("old_log_prob", inputs.old_log_prob, (batch, height, width), device=device)
    check_tensor("advantage", inputs.advantage, (batch,), device=device)
    if weights is not None:
        check_tensor("weights", weights, (batch, "h", "w"), device=device)
        if height % weights.shape[1] or width % weights.shape[2]:
            raise ValueError(
                f"weights: expected a grid [{batch}, h, w] that divides the latent's [{height}, {width}], "
                f"got {list(weights.shape)}"
            )
    if mask is not None:
        check_tensor("mask", mask, (batch, height, width), dtypes=(torch.bool, *FLOATS), device=device)
        mask = mask.bool()
    check_choice("objective", objective, OBJECTIVES)
    if inputs.old_velocity is not None:
        check_tensor("old_velocity", inputs.old_velocity, velocity.shape, device=device)
    elif objective in ("guard", "dppo"):
        raise ValueError(
            f"old_velocity: expected a tensor {list(velocity.shape)} because objective is {objective!r}, got None"
        )
    limit: float | None = inputs.divergence_limit
    if limit is not None:
        limit = check_number("divergence_limit", limit, low=0.0)
    elif objective == "dppo":
        raise ValueError("divergence_limit: expected a number of at least 0 because objective is 'dppo', got None")
    clip_range = check_clip_range("clip_range", inputs.clip_range)
    check_choice("granularity", inputs.granularity, GRANULARITIES)
    check_choice("kl_scale", inputs.kl_scale, KL_SCALES)
    kl_weight = check_number("kl_weight", inputs.kl_weight, low=0.0)
    if inputs.reference_velocity is not None:
        check_tensor("reference_velocity", inputs.reference_velocity, velocity.shape, device=device)
    elif kl_weight > 0:
        raise ValueError(
            f"reference_velocity: expected a tensor {list(velocity.shape)} because kl_weight is {kl_weight}, got None"
        )
    guidance = check_guidance(velocity, inputs.unconditional_velocity, inputs.guidance_scale)
    return inputs._replace(
        mask=mask,
        clip_range=clip_range,
        divergence_limit=limit or 0.0,
        kl_weight=kl_weight,
        guidance_scale=guidance,
    )
