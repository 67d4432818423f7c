"""Noise levels of flow models, as diffusers' FlowMatchEulerDiscreteScheduler sets them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_euler(scheduler: Any) -> None:
    """Refuse a scheduler whose steps are others than Euler's between the noise levels that it sets.

    Raises:
        ValueError: with what it is.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if type(scheduler) is not FlowMatchEulerDiscreteScheduler:
        raise ValueError(f"expected the scheduler FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}")
    if scheduler.config.get("stochastic_sampling"):
        raise ValueError("expected a scheduler without stochastic_sampling, which draws noise of its own")


def flow_schedule(
    scheduler: Any, steps: int, tokens: int, device: torch.device, *, even: bool, shift: float | None = None
) -> tuple[Tensor, Tensor]:
    """Noise levels [steps + 1] and timesteps [steps].

    Args:
        scheduler: is left as it is.
        tokens: of the image, by which a scheduler that shifts dynamically does so.
        even: hand it levels from 1 to 1/steps to shift, instead of letting it choose.
        shift: what takes the place of the shift that a dynamic one would get from `tokens`.
    """
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    scheduler = copy.deepcopy(scheduler)
    options: dict[str, Any] = {"num_inference_steps": steps}
    if even:
        options = {"sigmas": np.linspace(1.0, 1.0 / steps, steps)}
    if scheduler.config.get("use_dynamic_shifting"):
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        options["mu"] = calculate_shift(tokens, *(scheduler.config[name] for name in names)) if shift is None else shift
    scheduler.set_timesteps(device=device, **options)
    return scheduler.sigmas.to(device), scheduler.timesteps.to(device)
