"""The samples of an iteration: every prompt's group drawn, rewarded, and kept with what the update needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from star_trainer.config import Config, RolloutConfig
from star_trainer.families.conditioning import Conditioning
from star_trainer.families.devices import Handover, finish
from star_trainer.families.policy import Policy
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardFunction
from star_trainer.run.interruption import stop_if_asked
from star_trainer.run.randomness import numpy_stream, stream
from star_trainer.sampling import NonFiniteError, Trajectory, denoise, text_units
from star_trainer.worlds.scenes.oracle import true_maps


@dataclass(frozen=True)
class Rollout:
    """Samples of one iteration, those that this process has, in any order.

    `drawn` are the prompts of the whole iteration and `conditioning` has one row for each; `places` [B] tells which of
    the iteration's samples these are, `group_size` of which belong to every prompt; `rewards` [B], or [B, K] of K
    terms, are theirs.
    `seconds`: `rollout` is sampling, `reward` the worker's time, `reward_hidden` what of that passed during sampling,
    and `reward_wait` what the iteration waited after it.
    """

    trajectory: Trajectory
    timesteps: Tensor
    conditioning: Conditioning
    rewards: np.ndarray
    drawn: list[Prompt]
    places: np.ndarray
    group_size: int
    seconds: dict[str, float]

    @property
    def groups(self) -> np.ndarray:
        """Each sample's prompt, as a row of `conditioning` [B]."""
        return prompt_of(self.places, self.group_size, len(self.drawn))

    @property
    def prompts(self) -> list[Prompt]:
        """Each sample's prompt."""
        return [self.drawn[group] for group in self.groups]

    @property
    def log_prob(self) -> Tensor:
        """[S, B, H, W] of the steps with noise, from `trajectory.first_noisy` on."""
        assert self.trajectory.log_prob is not None, "rollouts are drawn with noise"
        return self.trajectory.log_prob

    def conditioning_of(self, rows: Tensor) -> Conditioning:
        """The conditioning of some samples, which is kept once per prompt."""
        return self.conditioning[torch.from_numpy(self.groups)[rows]]


def prompt_of(places: np.ndarray, group_size: int, prompts: int) -> np.ndarray:
    """The prompt of each sample; a place beyond the last group, which only makes up a number, takes the last's."""
    return np.minimum(places // group_size, prompts - 1)


def collect(
    policy: Policy,
    config: Config,
    prompts: Sequence[Prompt],
    reward: RewardFunction,
    worker: Executor,
    iteration: int,
    places: np.ndarray | None = None,
) -> Rollout:
    """Sample groups of the iteration's `prompts`; each batch is rewarded in `worker` while the next one is sampled.

    `places` are those of the samples to be drawn, by default all: sample i is of prompt i // ``rollout.samples``. A
    place decides the noise, so that samples do not depend on how many processes share the work or how large their
    batches are.
    """
    section, seed = config.rollout, config.run.seed
    if places is None:
        places = np.arange(len(prompts) * section.samples)
    of_place = prompt_of(places, section.samples, len(prompts))
    conditioning = policy.encode([prompt.text for prompt in prompts])
    units = text_units(policy, prompts) if config.uses_maps else None
    trajectories: list[Trajectory] = []
    pending: list[Future[_Judged]] = []
    noisy = noisy_steps(section, seed, iteration)
    broken: NonFiniteError | None = None
    start = time.perf_counter()
    for first in range(0, len(places), section.batch_size):
        if not config.model.sharded:
            # Where the weights are spread over the processes, the others' next batch needs this one.
            stop_if_asked()
        rows = slice(first, first + section.batch_size)
        groups = torch.from_numpy(of_place[rows])
        try:
            trajectory = denoise(
                policy,
                conditioning[groups],
                steps=section.steps,
                kind=section.sampler,
                generator=[stream(seed, "rollout", iteration, place) for place in places[rows].tolist()],
                eta=section.eta,
                noisy=noisy,
                initial=_group_noise(policy, config, iteration, groups) if section.shared_noise else None,
                guidance_scale=section.guidance_scale,
                units=None if units is None else units[groups],
                allocation=config.allocation,
                keep_velocity=config.needs_old_velocity,
                backend=config.backend,
            )
        except NonFiniteError as error:
            if not config.model.sharded:
                raise
            # The others need this process in their next batches, too.
            broken = broken or error
            continue
        judged = [prompts[group] for group in groups.tolist()]
        pending.append(worker.submit(_judge, policy, config, Handover(trajectory.latents[-1]), judged, reward))
        trajectories.append(trajectory.to("cpu") if section.keep_on_host else trajectory)
    if broken is not None:
        raise broken
    # Else what a GPU has still to do would count as waiting for the reward.
    finish(policy.device)
    sampled = time.perf_counter()
    judgements = [future.result() for future in pending]
    end = time.perf_counter()
    trajectory = Trajectory.joined(trajectories)
    if config.method == "oracle":
        maps = torch.cat([judged.maps for judged in judgements if judged.maps is not None], dim=1)
        trajectory = replace(trajectory, weights=maps.to(trajectory.latents.device))
    _, timesteps = policy.schedule(section.steps)
    return Rollout(
        trajectory=trajectory,
        timesteps=timesteps,
        conditioning=conditioning,
        rewards=np.concatenate([judged.rewards for judged in judgements]),
        drawn=list(prompts),
        places=places,
        group_size=section.samples,
        seconds={
            "rollout": sampled - start,
            "reward": sum(judged.end - judged.start for judged in judgements),
            "reward_hidden": sum(max(0.0, min(judged.end, sampled) - judged.start) for judged in judgements),
            "reward_wait": end - sampled,
        },
    )


def noisy_steps(config: RolloutConfig, seed: int, iteration: int) -> range:
    """The denoising steps of an iteration that draw noise, the same for all its samples.

    Where a window begins has a random stream of its own.
    """
    if config.sde_window is None:
        return range(config.noisy_steps)
    size, (first, end) = config.sde_window.size, config.sde_window.range
    start = int(numpy_stream(seed, "window", iteration).integers(first, end - size, endpoint=True))
    return range(start, start + size)


def _group_noise(policy: Policy, config: Config, iteration: int, prompts: Tensor) -> Tensor:
    """The noise that the samples of each prompt start from, [B, C, H, W] for the B samples' prompts."""
    generators = [stream(config.run.seed, "initial", iteration, prompt) for prompt in prompts.tolist()]
    return randn_tensor((len(prompts), *policy.latent_shape), generator=generators, device=torch.device("cpu"))


@dataclass(frozen=True)
class _Judged:
    """A batch's rewards [B], the maps [T, B, h, w] that its images give (for the oracle), and when that was done."""

    rewards: np.ndarray
    maps: Tensor | None
    start: float
    end: float


def _judge(
    policy: Policy, config: Config, handover: Handover, prompts: Sequence[Prompt], reward: RewardFunction
) -> _Judged:
    start = time.perf_counter()
    maps = None
    with handover.taken() as latents:
        images = policy.decode(latents)
        rewards = reward(images, prompts)
        if config.method == "oracle":
            maps = true_maps(images, prompts, policy.grid, config.allocation, config.rollout.steps)
    return _Judged(rewards, maps, start, time.perf_counter())
