"""How images of prompts form: what each denoising step predicts, and where each text unit's map lies."""

from __future__ import annotations

from collections.abc import Sequence

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


def watch_denoising(
    policy: Policy,
    config: Config,
    prompts: Sequence[Prompt],
    generators: list[torch.Generator],
    guidance_scale: float,
    *,
    steps: int,
    maps: bool,
) -> Denoising:
    """Sample an image per prompt without the sampler's noise, and keep what a page shows of it.

    `maps` records the attention; each unit that has tokens then gets a map of its own.
    """
    units = text_units(policy, prompts) if maps else None
    alone: list[Tensor] = []

    def keep(step: int, recorder: sk.AttentionRecorder) -> None:
        """The maps [B, K, h, w] that the step would have if each of its K units were a prompt's only one."""
        mass = recorder.mass
        each = mass.transpose(1, 2).flatten(0, 1)[..., None].contiguous()
        maps = map_of_mass(policy, each, recorder.grid, config.allocation, step, config.backend)
        alone.append(maps.unflatten(0, (len(mass), -1)))

    trajectory = denoise(
        policy,
        policy.encode([prompt.text for prompt in prompts]),
        steps=steps,
        kind="ode",
        generator=generators,
        guidance_scale=guidance_scale,
        units=units,
        allocation=config.allocation if maps else None,
        watch=keep,
        backend=config.backend,
    )
    kept = np.linspace(0, steps - 1, min(steps, _MOST_STEPS)).round().astype(int).tolist()
    predicted = [policy.decode(clean_latents(policy, trajectory, step)[:MOST_PROMPTS]) for step in kept[:-1]]
    images = policy.decode(trajectory.latents[-1])
    pictures = [np.stack([*(each[i] for each in predicted if i < len(each)), image]) for i, image in enumerate(images)]
    found: list[dict[str, np.ndarray]] = [{} for _ in prompts]
    if units is not None:
        assert trajectory.weights is not None, "units were given"
        own = torch.stack(alone)
        own = with_last(own) if config.allocation.map == "geometric" else own
        weights, single = (each[kept].float().cpu().numpy() for each in (trajectory.weights, own))
        for place, (names, missing) in enumerate(zip(units.names, units.missing, strict=True)):
            found[place] = {name: single[:, place, k] for k, name in enumerate(names) if name not in missing}
            found[place] = {ALL_WORDS: weights[:, place]} | found[place]
    levels = policy.schedule(steps)[0][kept].tolist()
    numbers = [step + 1 for step in kept]
    texts = [prompt.text for prompt in prompts]
    return Denoising(texts, pictures, numbers, levels, policy.family.noising.symbol, found)
