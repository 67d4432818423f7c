"""Inputs and unfused baselines of the operators on latents: transition, policy loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import star_kernels as sk
from star_kernels.policy_loss import reference as loss_reference
from star_kernels.transition import reference as transition_reference

CLIP_RANGE = 6.4e-3  # Flow-GRPO's 1e-4 of an image, at a position of a 64 x 64 latent


@dataclass(frozen=True)
class LatentCase:
    """One denoising step of B latents as the rollout stores it, and a velocity that has moved a little since.

    velocity, sample, next_sample, noise [B, C, H, W]; old_log_prob [B, H, W]; weights [B, H/2, W/2]; advantage [B].
    """

    velocity: Tensor
    sample: Tensor
    next_sample: Tensor
    noise: Tensor
    old_log_prob: Tensor
    weights: Tensor
    advantage: Tensor
    coefficients: sk.TransitionCoefficients


def make_case(
    batch: int, channels: int, side: int, device: torch.device, velocity_dtype: torch.dtype = torch.float32
) -> LatentCase:
    """Latents in fp32, as samplers keep them; the velocity in the dtype that the transformer computes in."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(batch, channels, side, side, generator=generator).to(device)

    sigma = torch.linspace(0.95, 0.3, batch)
    coefficients = sk.transition_coefficients("flow_sde", sigma, 0.8 * sigma).to(device)
    old_velocity, sample, noise = normal().to(velocity_dtype), normal(), normal()
    step = sk.transition_step(old_velocity, sample, coefficients, noise=noise, backend="reference")
    assert step.log_prob is not None
    weights = torch.rand(batch, side // 2, side // 2, generator=generator)
    return LatentCase(
        velocity=(old_velocity + 1e-2 * normal()).to(velocity_dtype),
        sample=sample,
        next_sample=step.next_sample,
        noise=noise,
        old_log_prob=step.log_prob,
        weights=(weights / weights.mean((1, 2), keepdim=True)).to(device),
        advantage=torch.randn(batch, generator=generator).to(device),
        coefficients=coefficients,
    )


def total_bytes(*tensors: Tensor) -> int:
    """Bytes of the tensors: what has to move at least when each is read or written once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def loss_bytes(case: LatentCase) -> int:
    """Every input of the policy loss read once, the gradient written once."""
    latents = (case.velocity, case.sample, case.next_sample)
    return total_bytes(*latents, case.old_log_prob, case.weights, case.advantage, case.velocity)


def step_bytes(case: LatentCase) -> int:
    """Every input of the transition read once, next sample and log-prob written once."""
    return total_bytes(case.velocity, case.sample, case.noise, case.sample, case.old_log_prob)


def loss_and_backward(case: LatentCase, backend: str) -> Tensor:
    """The gradient of the policy loss with respect to the velocity, through the public function and autograd."""
    velocity = case.velocity.detach().requires_grad_()
    result = sk.policy_loss(
        velocity,
        case.sample,
        case.next_sample,
        case.old_log_prob,
        case.advantage,
        case.coefficients,
        weights=case.weights,
        clip_range=CLIP_RANGE,
        backend=backend,
    )
    result.loss.backward()
    assert velocity.grad is not None
    return velocity.grad


def loss_inputs(case: LatentCase) -> loss_reference.Inputs:
    """The same arguments as the definition takes them."""
    return loss_reference.Inputs(
        case.velocity,
        case.sample,
        case.next_sample,
        case.old_log_prob,
        case.advantage,
        case.coefficients.sample_drift,
        case.coefficients.velocity_scale,
        case.coefficients.std,
        case.coefficients.std,
        weights=case.weights,
        mask=None,
        reference_velocity=None,
        unconditional_velocity=None,
        clip_low=CLIP_RANGE,
        clip_high=CLIP_RANGE,
        granularity="position",
        kl_weight=0.0,
        guidance_scale=1.0,
    )


def compiled_loss(case: LatentCase, compiler: str = "inductor") -> Callable[[], Tensor]:
    """Loss and gradient of the definition in one graph of torch.compile, without autograd between them."""

    def loss_and_gradient(inputs: loss_reference.Inputs) -> tuple[Tensor, Tensor, Tensor]:
        loss, metrics, gradient = loss_reference.policy_loss_and_gradient(inputs)
        return loss, metrics, gradient.to(inputs.velocity.dtype)

    compiled = torch.compile(loss_and_gradient, backend=compiler, dynamic=False)
    inputs = loss_inputs(case)
    return lambda: compiled(inputs)[2]


def step(case: LatentCase, backend: str) -> sk.TransitionStep:
    """The next sample and its log-prob."""
    return sk.transition_step(case.velocity, case.sample, case.coefficients, noise=case.noise, backend=backend)


def compiled_step(case: LatentCase, compiler: str = "inductor") -> Callable[[], tuple[Tensor, Tensor | None]]:
    """The definition of the transition under torch.compile."""
    scalars = (case.coefficients.sample_drift, case.coefficients.velocity_scale, case.coefficients.std)
    compiled = torch.compile(transition_reference.transition_step, backend=compiler, dynamic=False)
    return functools.partial(compiled, case.velocity, case.sample, case.noise, None, *scalars, guidance_scale=1.0)
