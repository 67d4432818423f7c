"""Denoising with everything the update needs: latents, per-position log-probs and allocation maps of every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.functional import interpolate

import star_kernels as sk
from star_trainer.config import Allocation, TrainerError
from star_trainer.families.conditioning import Conditioning, recorded_pass
from star_trainer.families.devices import send
from star_trainer.families.noising import Noising
from star_trainer.families.policy import Policy
from star_trainer.prompts import Prompt

# A trajectory's tensors that have a place for each sample.
PER_SAMPLE = ("latents", "log_prob", "weights", "velocity")


class NonFiniteError(TrainerError, RuntimeError):
    """NaN or infinity where training cannot go on."""


@dataclass(frozen=True)
class Trajectory:
    """One batch of denoising.

    latents [T+1, B, C, H, W]; log_prob [S, B, H, W] of the S steps with noise, which follow each other, or None;
    weights [T, B, h, w], or None if attention was not recorded; coefficients of the T steps, one row each; velocity
    [S, B, C, H, W] of the steps with noise, guidance applied, or None if it was not kept; attention what computed that
    of the recorded layers (`AttentionRecorder.implementation`), or None.
    """

    latents: Tensor
    log_prob: Tensor | None
    weights: Tensor | None
    coefficients: list[sk.TransitionCoefficients]
    velocity: Tensor | None = None
    attention: str | None = None

    @property
    def first_noisy(self) -> int:
        """The step whose log-prob is the first."""
        return next(step for step, row in enumerate(self.coefficients) if row.stochastic)

    def to(self, device: str | torch.device) -> Trajectory:
        """The same with its tensors of the size of the batch on another device."""
        return self.changed(lambda tensor: tensor.to(device))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Trajectory:
        """The same with each of its tensors of the size of the batch [*, B, ...] changed."""
        tensors = {name: getattr(self, name) for name in PER_SAMPLE}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **changed)

    @classmethod
    def joined(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """The samples of several trajectories in one."""
        tensors = {name: [getattr(part, name) for part in parts] for name in PER_SAMPLE}
        joined: dict[str, Any] = {name: torch.cat(each, dim=1) for name, each in tensors.items() if each[0] is not None}
        return replace(parts[0], **joined)


def text_units(policy: Policy, prompts: Sequence[Prompt]) -> sk.TextUnits:
    """The prompts' units on the pipeline's text tokens."""
    return policy.text_units([prompt.text for prompt in prompts], [prompt.units for prompt in prompts])


def missing_units(units: sk.TextUnits) -> dict[str, float]:
    """Shares: of the units that have no token, and of the prompts that no unit is left of, whose maps are uniform."""
    total, missing = sum(map(len, units.names)), sum(map(len, units.missing))
    bare = sum(len(names) == len(absent) for names, absent in zip(units.names, units.missing, strict=True))
    return {"units_missing": missing / max(total, 1), "prompts_without_units": bare / len(units)}


@torch.no_grad()
def denoise(
    policy: Policy,
    conditioning: Conditioning,
    *,
    steps: int,
    kind: str,
    generator: torch.Generator | list[torch.Generator],
    eta: float = 0.0,
    noisy: range | None = None,
    initial: Tensor | None = None,
    guidance_scale: float = 1.0,
    units: sk.TextUnits | None = None,
    allocation: Allocation | None = None,
    keep_velocity: bool = False,
    watch: Callable[[int, sk.AttentionRecorder], None] | None = None,
    backend: str = "auto",
) -> Trajectory:
    """Denoise B latents from noise drawn on the CPU by `generator`, so that results do not depend on the device.

    With one generator per sample a sample does not depend on what else is in the batch, either.

    The steps in `noisy` (by default all) are of `kind`, the others those of the pipeline, without noise. `initial`
    [B, C, H, W] takes the place of the noise that denoising starts from.

    With `units` the transformer's attention is recorded and each step gets its allocation map. Where guidance takes a
    second prediction, each has a call of its own, as in training, and the conditional one is recorded.

    `keep_velocity` keeps what was predicted at the steps with noise. `watch` is called with each step and what was
    recorded in it.
    """
    batch, shape, device = len(conditioning), policy.latent_shape, policy.device
    sigmas, timesteps = policy.schedule(steps)

    def draw() -> Tensor:
        return randn_tensor((batch, *shape), generator=generator, device=torch.device("cpu"))

    guidance = policy.guidance(batch, guidance_scale)
    kinds = [kind if noisy is None or step in noisy else "ode" for step in range(steps)]
    coefficients = _coefficients(policy.family.noising, kinds, sigmas.cpu(), eta, device)
    # All that the steps take from the host crosses before them: a copy in between would wait for the device.
    draws = [draw() for _ in range((initial is None) + sum(row.stochastic for row in coefficients))]
    noise = iter(send(torch.stack(draws), device) if draws else ())
    latents = [next(noise) if initial is None else send(initial, device)]
    log_probs, weights, velocities = [], [], []
    recording: Any = nullcontext()
    if units is not None:
        assert allocation is not None, "maps are made as the allocation section says"
        options = {"backend": backend, "record_pass": recorded_pass(guidance), **allocation.recorded}
        recording = sk.record_attention(policy.transformer, units, **options)
    with recording as recorder:
        for step in range(steps):
            current = latents[-1]
            prediction = policy.predict(current, timesteps[step], conditioning, guidance)
            row = coefficients[step]
            result = sk.transition_step(
                prediction.velocity,
                current,
                row,
                noise=next(noise) if row.stochastic else None,
                unconditional_velocity=prediction.unconditional,
                guidance_scale=prediction.scale,
                backend=backend,
            )
            latents.append(result.next_sample)
            if result.log_prob is not None:
                log_probs.append(result.log_prob)
                if keep_velocity:
                    velocities.append(prediction.guided)
            if recorder is not None:
                assert allocation is not None, "recorded"
                weights.append(map_of_step(policy, recorder, allocation, step, backend))
                if watch is not None:
                    watch(step, recorder)
                recorder.discard_step()
    if not torch.isfinite(latents[-1]).all():
        bad = [i for i in range(batch) if not torch.isfinite(latents[-1][i]).all()]
        step = next(t for t, latent in enumerate(latents) if not torch.isfinite(latent).all()) - 1
        raise NonFiniteError(f"denoising gave NaN or infinity, first at step {step}, in samples {bad[:8]}")
    maps = torch.stack(weights) if weights else None
    if maps is not None and allocation is not None and allocation.map == "geometric":
        maps = with_last(maps)
    return Trajectory(
        torch.stack(latents),
        torch.stack(log_probs) if log_probs else None,
        maps,
        coefficients,
        torch.stack(velocities) if velocities else None,
        None if recorder is None else recorder.implementation,
    )


def map_of_step(policy: Policy, recorder: Any, allocation: Allocation, step: int, backend: str) -> Tensor:
    """The allocation map [B, h, w] of what was recorded at a step, on the policy's grid."""
    return map_of_mass(policy, recorder.mass, recorder.grid, allocation, step, backend)


def map_of_mass(
    policy: Policy, mass: Tensor, grid: tuple[int, int] | None, allocation: Allocation, step: int, backend: str
) -> Tensor:
    """The allocation map [B, h, w] of a recorder's mass [B, N, K] and grid at a step, on the policy's grid.

    Layers that are all coarser than it, of a U-Net, give one of their grid, whose places several tokens then share.
    """
    grid = grid or policy.grid
    weights = sk.allocation_map(mass, grid, backend=backend, **allocation.options(step))
    return weights if grid == policy.grid else interpolate(weights[:, None], policy.grid, mode="nearest")[:, 0]


def clean_latents(policy: Policy, trajectory: Trajectory, step: int) -> Tensor:
    """The clean latents [B, C, H, W] that a step without noise predicts, guidance applied."""
    row, now, after = trajectory.coefficients[step], trajectory.latents[step], trajectory.latents[step + 1]
    # The step is linear in what was predicted: after = (1 + drift)·now + scale·velocity.
    velocity = (after - (1 + row.sample_drift) * now) / row.velocity_scale
    clean = policy.family.noising.to_clean(policy.schedule(len(trajectory.coefficients))[0][step].cpu())
    return (1 + float(clean.sample_drift)) * now + float(clean.velocity_scale) * velocity


def with_last(maps: Tensor) -> Tensor:
    """The geometric mean of each step's maps [T, ..., h, w] with the last step's, of mean 1 (docs/method.md, 4).

    Where the two have no place in common the step's own map stays.
    """
    both = (maps * maps[-1]).sqrt()
    mean = both.mean((-2, -1), keepdim=True)
    return torch.where(mean > 0, both / mean, maps)


def _coefficients(
    noising: Noising, kinds: Sequence[str], levels: Tensor, eta: float, device: torch.device
) -> list[sk.TransitionCoefficients]:
    """Those of all steps between noise levels [T+1], computed where the levels are and sent in one piece."""
    second = levels[1]
    rows = [
        noising.step(kind, now, after, eta=eta, second=second)
        for kind, now, after in zip(kinds, levels[:-1], levels[1:], strict=True)
    ]
    # [T, 4, 1]; a step without a rate of noise has its std in that place, which nobody reads.
    table = [
        torch.stack(
            [row.sample_drift, row.velocity_scale, row.std, row.std if row.noise_rate is None else row.noise_rate]
        )
        for row in rows
    ]
    sent = send(torch.stack(table), device)
    return [
        replace(
            row,
            sample_drift=drift,
            velocity_scale=scale,
            std=std,
            noise_rate=None if row.noise_rate is None else rate,
        )
        for row, (drift, scale, std, rate) in zip(rows, sent, strict=True)
    ]
