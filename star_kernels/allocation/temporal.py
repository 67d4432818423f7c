"""How much each denoising step counts, docs/method.md, section 4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from star_kernels._checks import check_choice
from star_kernels._gaussian import TransitionCoefficients

KINDS = ("none", "std", "velocity")


def temporal_weights(
    coefficients: Sequence[TransitionCoefficients] | TransitionCoefficients, *, kind: str = "none"
) -> Tensor:
    """Weights τ of the denoising steps, with mean 1 over the steps given (docs/method.md, section 4).

    A step's policy term is multiplied by its weight; its KL is not. They say how a trajectory's advantage is divided
    among its steps, as `allocation_map` does among positions, and both multiply.

    Args:
        coefficients: one per step that is trained on, in their order, each for one noise level: with one row, or with
            rows that are all equal. Or one `TransitionCoefficients` whose rows are the steps. Of any kind with noise.
        kind: ``none`` (τ = 1), ``std`` (τ ∝ s) or ``velocity`` (τ ∝ (s/b)², which makes the policy gradient with
            respect to the velocity proportional to A·w·ε·s/b at every step).

    Returns:
        τ [T] ≥ 0 in float32 with mean 1, on the device of the coefficients.

    Raises:
        TypeError: coefficients that are none.
        ValueError: an unknown kind, no step, a step without noise, or rows of a step that differ; values on a GPU are
            not looked at, as that would wait for the device.
    """
    check_choice("kind", kind, KINDS)
    if isinstance(coefficients, TransitionCoefficients):
        _check_noise("coefficients", coefficients)
        std, velocity_scale = coefficients.std.double(), coefficients.velocity_scale.double()
    else:
        steps = [_step(f"coefficients[{index}]", step) for index, step in enumerate(_sequence(coefficients))]
        std, velocity_scale = torch.stack(steps).unbind(1)
    if kind == "none":
        weights = torch.ones_like(std)
    elif kind == "std":
        weights = std
    else:
        weights = (std / velocity_scale).square()
    return (weights / weights.mean()).float()


def _sequence(coefficients: object) -> Sequence[object]:
    if not isinstance(coefficients, (list, tuple)):
        raise TypeError(
            f"coefficients: expected a list of TransitionCoefficients, one per step, got {type(coefficients).__name__}"
        )
    if not coefficients:
        raise ValueError("coefficients: expected those of at least one step, got an empty list")
    return coefficients


def _check_noise(name: str, step: TransitionCoefficients) -> None:
    if not step.stochastic:
        raise ValueError(f"{name}: expected a step with noise, got {step.kind} with s = 0, which cannot be trained on")


def _step(name: str, step: object) -> Tensor:
    """s and b [2] of one step."""
    if not isinstance(step, TransitionCoefficients):
        raise TypeError(f"{name}: expected TransitionCoefficients, got {type(step).__name__}")
    _check_noise(name, step)
    rows = torch.stack((step.std, step.velocity_scale)).double()
    if rows.device.type == "cpu" and not bool((rows == rows[:, :1]).all()):
        raise ValueError(f"{name}: expected one noise level for all samples, got rows that differ")
    return rows[:, 0]
