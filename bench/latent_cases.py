"""Inputs and unfused baselines of the operators on latents: transition, policy loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import star_kernels as sk
from star_kernels.policy_loss import reference as loss_reference
from star_kernels.transition import reference as transition_reference

CLIP_RANGE = 6.4e-3  # Flow-GRPO's 1e-4 of an image, at a position of a 64 x 64 latent
DIVERGENCE_LIMIT = 1e-5
KL_WEIGHT, GUIDANCE_SCALE = 0.01, 4.5


@dataclass(frozen=True)
class LatentCase:
    """One denoising step of B latents as the rollout stores it, and a velocity that has moved a little since.

    velocity, sample, next_sample, noise and the three optional velocities [B, C, H, W]; old_log_prob [B, H, W]; weights
    [B, H/2, W/2]; advantage [B].
    """

    velocity: Tensor
    sample: Tensor
    next_sample: Tensor
    noise: Tensor
    old_log_prob: Tensor
    weights: Tensor
    advantage: Tensor
    coefficients: sk.TransitionCoefficients
    reference_velocity: Tensor | None = None
    unconditional_velocity: Tensor | None = None
    old_velocity: Tensor | None = None
    objective: str = "clip"
    granularity: str = "position"

    @property
    def guidance_scale(self) -> float:
        return 1.0 if self.unconditional_velocity is None else GUIDANCE_SCALE

    @property
    def kl_weight(self) -> float:
        return 0.0 if self.reference_velocity is None else KL_WEIGHT

    def __str__(self) -> str:
        dtype = str(self.velocity.dtype).removeprefix("torch.")
        return f"{'x'.join(map(str, self.velocity.shape))}, velocity in {dtype}"


def make_case(
    batch: int,
    channels: int,
    side: int,
    device: torch.device,
    velocity_dtype: torch.dtype = torch.float32,
    *,
    objective: str = "clip",
    granularity: str = "position",
    kl_and_guidance: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> LatentCase:
    """Latents in fp32, as samplers keep them; the velocities in the dtype that the transformer computes in."""
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        noise = torch.randn(batch, channels, side, side, generator=generator, device=device)
        return noise.contiguous(memory_format=memory_format)

    def moved(velocity: Tensor) -> Tensor:
        return (velocity + 1e-2 * normal()).to(velocity_dtype)

    sigma = torch.linspace(0.95, 0.3, batch)
    coefficients = sk.transition_coefficients("flow_sde", sigma, 0.8 * sigma).to(device)
    old_velocity, sample, noise = normal().to(velocity_dtype), normal(), normal()
    step = sk.transition_step(old_velocity, sample, coefficients, noise=noise, backend="reference")
    assert step.log_prob is not None
    weights = torch.rand(batch, side // 2, side // 2, generator=generator, device=device)
    return LatentCase(
        velocity=moved(old_velocity),
        sample=sample,
        next_sample=step.next_sample.contiguous(memory_format=memory_format),
        noise=noise,
        old_log_prob=step.log_prob,
        weights=weights / weights.mean((1, 2), keepdim=True),
        advantage=torch.randn(batch, generator=generator, device=device),
        coefficients=coefficients,
        reference_velocity=moved(old_velocity) if kl_and_guidance else None,
        unconditional_velocity=moved(old_velocity) if kl_and_guidance else None,
        old_velocity=None if objective in ("clip", "none") else old_velocity,
        objective=objective,
        granularity=granularity,
    )


def in_float64(case: LatentCase) -> LatentCase:
    """The same numbers in float64, in which the definition is exact enough to compare with."""
    scalars = {name: getattr(case.coefficients, name).double() for name in ("sample_drift", "velocity_scale", "std")}
    values = {entry.name: getattr(case, entry.name) for entry in fields(case)}
    tensors: dict[str, Any] = {name: value.double() for name, value in values.items() if isinstance(value, Tensor)}
    return replace(case, **tensors, coefficients=replace(case.coefficients, noise_rate=None, **scalars))


def total_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors: what has to move at least when each is read or written once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def copy(moved: int, device: torch.device) -> Callable[[], Tensor]:
    """Reads and writes `moved` bytes in all: how fast memory allows an operator to be that moves as many."""
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def loss_bytes(case: LatentCase) -> int:
    """Every input of the policy loss read once, the gradient written once."""
    velocities = (case.velocity, case.reference_velocity, case.unconditional_velocity, case.old_velocity)
    latents = (*velocities, case.sample, case.next_sample)
    return total_bytes(*latents, case.old_log_prob, case.weights, case.advantage, case.velocity)


def step_bytes(case: LatentCase) -> int:
    """Every input of the transition read once, next sample and log-prob written once."""
    inputs = (case.velocity, case.unconditional_velocity, case.sample, case.noise)
    return total_bytes(*inputs, case.sample, case.old_log_prob)


def log_prob_bytes(case: LatentCase) -> int:
    """Every input of the log-prob read once, and the log-prob written once."""
    inputs = (case.velocity, case.unconditional_velocity, case.sample, case.next_sample)
    return total_bytes(*inputs, case.old_log_prob)


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
        objective=case.objective,
        old_velocity=case.old_velocity,
        clip_range=CLIP_RANGE,
        divergence_limit=DIVERGENCE_LIMIT,
        granularity=case.granularity,
        reference_velocity=case.reference_velocity,
        kl_weight=case.kl_weight,
        unconditional_velocity=case.unconditional_velocity,
        guidance_scale=case.guidance_scale,
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
        case.coefficients,
        weights=case.weights,
        objective=case.objective,
        old_velocity=case.old_velocity,
        clip_range=(CLIP_RANGE, CLIP_RANGE),
        divergence_limit=DIVERGENCE_LIMIT,
        granularity=case.granularity,
        reference_velocity=case.reference_velocity,
        kl_weight=case.kl_weight,
        unconditional_velocity=case.unconditional_velocity,
        guidance_scale=case.guidance_scale,
    )


def _scalars(case: LatentCase) -> tuple[Tensor, Tensor, Tensor]:
    return case.coefficients.sample_drift, case.coefficients.velocity_scale, case.coefficients.std


def eager_loss(
    case: LatentCase, definition: Callable[..., tuple[Tensor, Tensor]] = loss_reference.policy_loss
) -> Callable[[], Tensor]:
    """The definition of loss and metrics, differentiated by autograd: what there is without the library."""
    inputs = loss_inputs(case)

    def gradient() -> Tensor:
        velocity = case.velocity.detach().requires_grad_()
        loss, _ = definition(inputs._replace(velocity=velocity))
        loss.backward()
        assert velocity.grad is not None
        return velocity.grad

    return gradient


def compiled_loss(case: LatentCase, compiler: str = "inductor") -> Callable[[], Tensor]:
    """The same under torch.compile, forward and backward."""
    return eager_loss(case, torch.compile(loss_reference.policy_loss, backend=compiler, dynamic=False))


def compiled_loss_and_gradient(case: LatentCase, compiler: str = "inductor") -> Callable[[], Tensor]:
    """Loss and gradient as the definition writes them down, in one graph of torch.compile and without autograd."""

    def loss_and_gradient(inputs: loss_reference.Inputs) -> tuple[Tensor, Tensor, Tensor]:
        loss, metrics, gradient = loss_reference.policy_loss_and_gradient(inputs)
        return loss, metrics, gradient.to(inputs.velocity.dtype)

    compiled = torch.compile(loss_and_gradient, backend=compiler, dynamic=False)
    inputs = loss_inputs(case)
    return lambda: compiled(inputs)[2]


def step(case: LatentCase, backend: str) -> sk.TransitionStep:
    """The next sample and its log-prob."""
    return sk.transition_step(
        case.velocity,
        case.sample,
        case.coefficients,
        noise=case.noise,
        unconditional_velocity=case.unconditional_velocity,
        guidance_scale=case.guidance_scale,
        backend=backend,
    )


def eager_step(
    case: LatentCase,
    definition: Callable[..., tuple[Tensor, Tensor | None]] = transition_reference.transition_step,
) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """The definition of the transition."""
    inputs = (case.velocity, case.sample, case.noise, case.unconditional_velocity, *_scalars(case))
    return lambda: definition(*inputs, guidance_scale=case.guidance_scale)


def compiled_step(case: LatentCase, compiler: str = "inductor") -> Callable[[], tuple[Tensor, Tensor | None]]:
    """The same under torch.compile."""
    return eager_step(case, torch.compile(transition_reference.transition_step, backend=compiler, dynamic=False))


def log_prob(case: LatentCase, backend: str) -> Tensor:
    """The log-prob of the next sample that is stored."""
    return sk.transition_log_prob(
        case.velocity,
        case.sample,
        case.next_sample,
        case.coefficients,
        unconditional_velocity=case.unconditional_velocity,
        guidance_scale=case.guidance_scale,
        backend=backend,
    )


def eager_log_prob(
    case: LatentCase, definition: Callable[..., Tensor] = transition_reference.transition_log_prob
) -> Callable[[], Tensor]:
    """The definition of the log-prob."""
    inputs = (case.velocity, case.sample, case.next_sample, case.unconditional_velocity, *_scalars(case))
    return lambda: definition(*inputs, guidance_scale=case.guidance_scale)


def compiled_log_prob(case: LatentCase, compiler: str = "inductor") -> Callable[[], Tensor]:
    """The same under torch.compile."""
    return eager_log_prob(
        case, torch.compile(transition_reference.transition_log_prob, backend=compiler, dynamic=False)
    )
