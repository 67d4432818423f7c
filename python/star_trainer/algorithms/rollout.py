"""Denoising with everything the update needs: latents, per-position log-probs and allocation maps of every step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

import star_kernels as sk
from star_trainer.config import Allocation, Config
from star_trainer.oracle import true_maps
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

    def to(self, device: str | torch.device) -> Trajectory:
        """The same with its tensors of the size of the batch on another device."""
        log_prob = None if self.log_prob is None else self.log_prob.to(device)
        weights = None if self.weights is None else self.weights.to(device)
        return Trajectory(self.latents.to(device), log_prob, weights, self.coefficients)


@dataclass(frozen=True)
class Rollout:
    """All samples of one iteration on this process: groups of `group_size` rows per prompt.

    `embeddings` has one row per prompt; `rewards` [B] and `prompts` have one entry per sample.
    """

    trajectory: Trajectory
    timesteps: Tensor
    embeddings: Embeddings
    rewards: np.ndarray
    prompts: list[ScenePrompt]
    seconds: dict[str, float]

    @property
    def group_size(self) -> int:
        return len(self.prompts) // len(self.embeddings.text)

    @property
    def log_prob(self) -> Tensor:
        """[S, B, H, W] of the steps with noise."""
        assert self.trajectory.log_prob is not None, "rollouts are drawn with noise"
        return self.trajectory.log_prob

    def embeddings_of(self, rows: Tensor) -> Embeddings:
        """The embeddings of some samples, which are kept once per prompt."""
        return self.embeddings[rows // self.group_size]


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
    generator: torch.Generator | list[torch.Generator],
    eta: float = 0.0,
    sde_steps: int | None = None,
    initial: Tensor | None = None,
    guidance_scale: float = 1.0,
    units: sk.TextUnits | None = None,
    allocation: Allocation | None = None,
    backend: str = "auto",
) -> Trajectory:
    """Denoise B latents from noise drawn on the CPU by `generator`, so that results do not depend on the device.

    With one generator per sample a sample does not depend on what else is in the batch, either.

    The first `sde_steps` steps (by default all) are of `kind`, the others Euler's. `initial` [B, C, H, W] takes the
    place of the noise that denoising starts from.

    With `units` the transformer's attention is recorded and each step gets its allocation map; under guidance
    both halves run in one call, as in diffusers' pipeline, and the conditional half is recorded.
    """
    batch, shape, device = len(embeddings.text), policy.latent_shape, policy.device
    sigmas, timesteps = policy.schedule(steps)

    def draw() -> Tensor:
        return randn_tensor((batch, *shape), generator=generator, device=torch.device("cpu")).to(device)

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
                        backend=backend,
                        **allocation.options(step),
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
    first_prompt: int = 0,
) -> Rollout:
    """Sample every prompt's group; each batch is rewarded in `worker` while the next one is sampled.

    `first_prompt` is the place of the first of `prompts` among those of the iteration over all processes: it decides
    the noise, so that samples do not depend on how many processes share the work or how large their batches are.
    """
    section, seed = config.rollout, config.run.seed
    repeated = [prompt for prompt in prompts for _ in range(section.samples)]
    embeddings = policy.encode([prompt.text for prompt in prompts])
    units = text_units(policy, prompts) if config.uses_maps else None
    trajectories: list[Trajectory] = []
    pending: list[Future[_Judged]] = []
    first_sample = first_prompt * section.samples
    start = time.perf_counter()
    for first in range(0, len(repeated), section.batch_size):
        rows = torch.arange(first, min(first + section.batch_size, len(repeated)))
        groups = rows // section.samples
        trajectory = denoise(
            policy,
            embeddings[groups],
            steps=section.steps,
            kind=section.sampler,
            generator=[stream(seed, "rollout", iteration, first_sample + row) for row in rows.tolist()],
            eta=section.eta,
            sde_steps=section.sde_steps,
            initial=_group_noise(policy, config, iteration, first_prompt + groups) if section.shared_noise else None,
            guidance_scale=section.guidance_scale,
            units=None if units is None else units[groups],
            allocation=config.allocation,
            backend=config.backend,
        )
        judged = [repeated[row] for row in rows.tolist()]
        pending.append(worker.submit(_judge, policy, config, trajectory.latents[-1], judged, reward))
        trajectories.append(trajectory.to("cpu") if section.keep_on_host else trajectory)
    sampled = time.perf_counter()
    judgements = [future.result() for future in pending]
    end = time.perf_counter()
    trajectory = _join(trajectories)
    if config.method == "oracle":
        maps = torch.cat([judged.maps for judged in judgements if judged.maps is not None], dim=1)
        trajectory = replace(trajectory, weights=maps.to(trajectory.latents.device))
    _, timesteps = policy.schedule(section.steps)
    return Rollout(
        trajectory=trajectory,
        timesteps=timesteps,
        embeddings=embeddings,
        rewards=np.concatenate([judged.rewards for judged in judgements]),
        prompts=repeated,
        seconds={
            "rollout": sampled - start,
            "reward": sum(judged.seconds for judged in judgements),
            "reward_wait": end - sampled,
        },
    )


def _group_noise(policy: Policy, config: Config, iteration: int, prompts: Tensor) -> Tensor:
    """The noise that the samples of each prompt start from, [B, C, H, W] for the B samples' prompts."""
    generators = [stream(config.run.seed, "initial", iteration, prompt) for prompt in prompts.tolist()]
    return randn_tensor((len(prompts), *policy.latent_shape), generator=generators, device=torch.device("cpu"))


@dataclass(frozen=True)
class _Judged:
    """A batch's rewards [B], the maps [T, B, h, w] that its images give (for the oracle), and what that took."""

    rewards: np.ndarray
    maps: Tensor | None
    seconds: float


def _judge(
    policy: Policy, config: Config, latents: Tensor, prompts: Sequence[ScenePrompt], reward: RewardFunction
) -> _Judged:
    start = time.perf_counter()
    images = policy.decode(latents)
    rewards = reward(images, prompts)
    maps = None
    if config.method == "oracle":
        maps = true_maps(images, prompts, policy.grid, config.allocation, config.rollout.steps)
    return _Judged(rewards, maps, time.perf_counter() - start)


def _join(parts: Sequence[Trajectory]) -> Trajectory:
    def stack(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors, dim=1)

    latents = stack("latents")
    assert latents is not None
    return Trajectory(latents, stack("log_prob"), stack("weights"), parts[0].coefficients)
