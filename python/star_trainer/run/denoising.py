"""How images of prompts form: what each denoising step predicts, and where each text unit's map lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

import star_kernels as sk
from star_trainer.config import Config
from star_trainer.families.policy import Policy
from star_trainer.prompts import Prompt
from star_trainer.report import ALL_WORDS, MOST_PROMPTS, Denoising
from star_trainer.sampling import clean_latents, denoise, map_of_mass, text_units, with_last

# Of more steps, as many evenly spread ones are kept.
_MOST_STEPS = 12


@dataclass(frozen=True)
class Watched:
    """N images of T denoising steps and their maps.

    Attributes:
        images: [N, H, W, 3] uint8.
        weights: the allocation maps [N, T, h, w], or None where no attention was recorded.
        levels: T noise levels, before each step.
    """

    images: np.ndarray
    weights: np.ndarray | None
    levels: list[float]
    _texts: list[str]
    _steps: list[int]
    # Of each batch of prompts the clean latents that the steps but the last one predict, on the CPU.
    _predicted: list[list[Tensor]]
    # Of each prompt the maps [S, h, w] of its units alone.
    _alone: list[dict[str, np.ndarray]]

    def denoising(self, policy: Policy) -> Denoising:
        """What a page shows of it. Pictures of early steps are decoded only here, by this process alone."""
        early: list[tuple[np.ndarray, ...]] = []
        for batch in self._predicted:
            early += zip(*(policy.decode(latents.to(policy.device)) for latents in batch), strict=True)
        pictures = [np.stack([*chain(*early[i : i + 1]), image]) for i, image in enumerate(self.images)]
        maps = self._alone
        if self.weights is not None:
            every = [{ALL_WORDS: weights[self._steps]} for weights in self.weights]
            # A unit of that name is not shown.
            maps = [first | single | first for first, single in zip(every, self._alone, strict=True)]
        levels = [self.levels[step] for step in self._steps]
        numbers = [step + 1 for step in self._steps]
        return Denoising(self._texts, pictures, numbers, levels, policy.family.noising.symbol, maps)


def watch_denoising(
    policy: Policy,
    config: Config,
    prompts: Sequence[Prompt],
    generators: list[torch.Generator],
    guidance_scale: float,
    *,
    steps: int,
    maps: bool,
) -> Watched:
    """Sample an image per prompt without the sampler's noise, `rollout.batch_size` at a time.

    Where the model is sharded every process must call it. `maps` records the attention; each unit that has tokens then
    gets a map of its own.
    """
    kept = np.linspace(0, steps - 1, min(steps, _MOST_STEPS)).round().astype(int).tolist()
    images: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    predicted: list[list[Tensor]] = []
    alone: list[dict[str, np.ndarray]] = []
    for first in range(0, len(prompts), config.rollout.batch_size):
        some = slice(first, first + config.rollout.batch_size)
        units = text_units(policy, prompts[some]) if maps else None
        single: list[Tensor] = []

        def keep(step: int, recorder: sk.AttentionRecorder, single: list[Tensor] = single) -> None:
            """The maps [B, K, h, w] that the step would have if each of its K units were a prompt's only one."""
            mass = recorder.mass
            each = mass.transpose(1, 2).flatten(0, 1)[..., None].contiguous()
            maps = map_of_mass(policy, each, recorder.grid, config.allocation, step, config.backend)
            single.append(maps.unflatten(0, (len(mass), -1)))

        trajectory = denoise(
            policy,
            policy.encode([prompt.text for prompt in prompts[some]]),
            steps=steps,
            kind="ode",
            generator=generators[some],
            guidance_scale=guidance_scale,
            units=units,
            allocation=config.allocation if maps else None,
            watch=keep,
            backend=config.backend,
        )
        images.append(policy.decode(trajectory.latents[-1]))
        if shown := max(0, MOST_PROMPTS - first):
            predicted.append([clean_latents(policy, trajectory, step)[:shown].cpu() for step in kept[:-1]])
        if units is None:
            continue
        assert trajectory.weights is not None, "units were given"
        weights.append(trajectory.weights.transpose(0, 1).float().cpu().numpy())
        stacked = torch.stack(single)
        stacked = with_last(stacked) if config.allocation.map == "geometric" else stacked
        own = stacked[kept].float().cpu().numpy()
        for place, (names, missing) in enumerate(zip(units.names, units.missing, strict=True)):
            alone.append({name: own[:, place, k] for k, name in enumerate(names) if name not in missing})
    return Watched(
        np.concatenate(images),
        np.concatenate(weights) if maps else None,
        policy.schedule(steps)[0][:steps].tolist(),
        [prompt.text for prompt in prompts],
        kept,
        predicted,
        alone or [{} for _ in prompts],
    )
