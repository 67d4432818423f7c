"""Denoising with everything the update needs: latents, per-position log-probs and allocation maps of every step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import star_kernels as sk
from star_trainer.config import Allocation, Config
from star_trainer.policy import Embeddings, Policy
from star_trainer.randomness import stream
from star_trainer.rewards import RewardFunction
from star_trainer.scenes import ScenePrompt


class NonFiniteError(RuntimeError):
    """NaN or infinity where training cannot go on."""


@dataclass(frozen=True)
class Trajectory:
    """One batch of denoising.

    latents [T+1, B, C, H, W]; log_prob [S, B, H, W] of the first S steps, those with noise, or None; weights
    [T, B, h, w], or None if attention was not recorded; coefficients of the T steps, one row each.
    """

    latents: Tensor
    log_prob: Tensor | None
    weights: Tensor | None
    coefficients: list[sk.TransitionCoefficients]


@dataclass(frozen=True)
class Rollout:
    """All samples of one iteration on this process: groups of `samples` rows per prompt."""

    trajectory: Trajectory
    timesteps: Tensor
    embeddings: Embeddings
    rewards: np.ndarray
    images: np.ndarray
    prompts: list[ScenePrompt]
    seconds: dict[str, float]


def text_units(policy: Policy, prompts: Sequence[ScenePrompt]) -> sk.TextUnits:
    """The prompts' units on the pipeline's text tokens."""
    return sk.TextUnits.from_pipeline(
        policy.pipeline,
        [prompt.text for prompt in prompts],
        [prompt.units for prompt in prompts],
        max_sequence_length=policy.config.max_sequence_length,
    ).to(policy.device)


@torch.no_grad()
def denoise(
    policy: Policy,
    embeddings: Embeddings,
    *,
    steps: int,
    kind: str,
    generator: torch.Generator,
    eta: float = 0.0,
    sde_steps: int | None = None,
    initial: Tensor | None = None,
    guidance_scale: float = 1.0,
    units: sk.TextUnits | None = None,
    allocation: Allocation | None = None,
    backend: str = "auto",
) -> Trajectory:
    """Denoise B latents from noise drawn on the CPU by `generator`, so that results do not depend on the device.

    The first `sde_steps` steps (by default all) are of `kind`, the others Euler's. `initial` [B, C, H, W] takes the
    place of the noise that denoising starts from.

    With `units` the transformer's attention is recorded and each step gets its allocation map; under guidance
    both halves run in one call, as in diffusers' pipeline, and the conditional half is recorded.
    """
    batch, shape, device = len(embeddings.text), policy.latent_shape, policy.device
    sigmas, timesteps = policy.schedule(steps)

    def draw() -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(device)

    guided = guidance_scale > 1.0
    if guided:
        empty = policy.encode([""]).expand(batch)
        embeddings = Embeddings(torch.cat([empty.text, embeddings.text]), torch.cat([empty.pooled, embeddings.pooled]))
    latents, log_probs, weights, coefficients = [draw() if initial is None else initial.to(device)], [], [], []
    layers = None if allocation is None else allocation.layers
    rows = slice(batch, None) if guided else None
    recording = (
        nullcontext()
        if units is None
        else sk.record_attention(policy.transformer, units, layers=layers, rows=rows, backend=backend)
    )
    with recording as recorder:
        for step in range(steps):
            current = latents[-1]
            model_input = torch.cat([current, current]) if guided else current
            velocity = policy.velocity(model_input, timesteps[step], embeddings)
            unconditional, velocity = velocity.chunk(2) if guided else (None, velocity)
            row = sk.transition_coefficients(
                kind if sde_steps is None or step < sde_steps else "ode",
                sigmas[step].cpu(),
                sigmas[step + 1].cpu(),
                eta=eta,
                sigma_max=sigmas[1].cpu(),
            ).to(device)
            result = sk.transition_step(
                velocity,
                current,
                row,
                noise=draw() if row.stochastic else None,
                unconditional_velocity=unconditional,
                guidance_scale=guidance_scale,
                backend=backend,
            )
            latents.append(result.next_sample)
            coefficients.append(row)
            if result.log_prob is not None:
                log_probs.append(result.log_prob)
            if recorder is not None:
                assert allocation is not None, "maps are made as the allocation section says"
                weights.append(
                    sk.allocation_map(
                        recorder.mass,
                        policy.grid,
                        combine=allocation.combine,
                        sharpness=allocation.sharpness,
                        smooth=allocation.smooth,
                        strength=allocation.strength,
                        clamp=allocation.clamp,
                        backend=backend,
                    )
                )
                recorder.discard_step()
    if not torch.isfinite(latents[-1]).all():
        bad = [i for i in range(batch) if not torch.isfinite(latents[-1][i]).all()]
        step = next(t for t, latent in enumerate(latents) if not torch.isfinite(latent).all()) - 1
        raise NonFiniteError(f"denoising gave NaN or infinity, first at step {step}, in samples {bad[:8]}")
    return Trajectory(
        torch.stack(latents),
        torch.stack(log_probs) if log_probs else None,
        torch.stack(weights) if weights else None,
        coefficients,
    )


def collect(
    policy: Policy,
    config: Config,
    prompts: Sequence[ScenePrompt],
    reward: RewardFunction,
    worker: Executor,
    iteration: int,
    rank: int,
) -> Rollout:
    """Sample every prompt's group; each batch is rewarded in `worker` while the next one is sampled."""
    section = config.rollout
    repeated = [prompt for prompt in prompts for _ in range(section.samples)]
    embeddings = policy.encode([prompt.text for prompt in prompts]).repeat_interleave(section.samples)
    units = text_units(policy, prompts).repeat_interleave(section.samples) if config.uses_maps else None
    trajectories: list[Trajectory] = []
    pending: list[Future[tuple[np.ndarray, np.ndarray, float]]] = []
    initial = None
    if section.shared_noise:
        noise = stream(config.run.seed, "initial", iteration, rank)
        initial = torch.randn(len(prompts), *policy.latent_shape, generator=noise).repeat_interleave(section.samples, 0)
    start = time.perf_counter()
    for chunk, first in enumerate(range(0, len(repeated), section.batch_size)):
        rows = slice(first, min(first + section.batch_size, len(repeated)))
        trajectory = denoise(
            policy,
            embeddings[rows],
            steps=section.steps,
            kind=section.sampler,
            generator=stream(config.run.seed, "rollout", iteration, rank, chunk),
            eta=section.eta,
            sde_steps=section.sde_steps,
            initial=None if initial is None else initial[rows],
            guidance_scale=section.guidance_scale,
            units=None if units is None else units[rows],
            allocation=config.allocation,
            backend=config.backend,
        )
        trajectories.append(trajectory)
        pending.append(worker.submit(_judge, policy, trajectory.latents[-1], repeated[rows], reward))
    sampled = time.perf_counter()
    judged = [future.result() for future in pending]
    end = time.perf_counter()
    busy = sum(seconds for _, _, seconds in judged)
    _, timesteps = policy.schedule(section.steps)
    return Rollout(
        trajectory=_join(trajectories),
        timesteps=timesteps,
        embeddings=embeddings,
        rewards=np.concatenate([values for values, _, _ in judged]),
        images=np.concatenate([images for _, images, _ in judged]),
        prompts=repeated,
        seconds={"rollout": sampled - start, "reward": busy, "reward_wait": end - sampled},
    )


def _judge(
    policy: Policy, latents: Tensor, prompts: Sequence[ScenePrompt], reward: RewardFunction
) -> tuple[np.ndarray, np.ndarray, float]:
    start = time.perf_counter()
    images = policy.decode(latents)
    return reward(images, prompts), images, time.perf_counter() - start


def _join(parts: Sequence[Trajectory]) -> Trajectory:
    def stack(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors, dim=1)

    latents = stack("latents")
    assert latents is not None
    return Trajectory(latents, stack("log_prob"), stack("weights"), parts[0].coefficients)
