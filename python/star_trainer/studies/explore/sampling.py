"""Groups of samples of a prompt, with the attention mass of every step and layer."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import star_kernels as sk
from star_kernels.text_units import stands_in
from star_trainer.algorithms.advantages import Advantages, advantages_of
from star_trainer.config import Config, ConfigError, Units, check_section
from star_trainer.config.settings import Evaluation, Model
from star_trainer.families.policy import Policy
from star_trainer.prompts import Prompt
from star_trainer.prompts.units import UnitExtractor
from star_trainer.rewards import WeightedSum, sum_of
from star_trainer.run.randomness import stream
from star_trainer.sampling import denoise, map_of_mass, text_units, with_last

MOST_SAMPLES = 16
# Two pages can be compared; each group has its masses in memory.
_MOST_KEPT = 2


@dataclass
class Group:
    """N samples of a prompt.

    images [N, H, W, 3] uint8; mass [T, L, N, tokens, K] float16 on `token_grid` (None: the policy's grid), of L
    recorded layers, whose indices are `layers`; levels: T noise levels; missing: units that have no token; rewards [N]
    and advantages, or None.
    """

    policy: Policy
    config: Config
    prompt: Prompt
    images: np.ndarray
    mass: Tensor
    token_grid: tuple[int, int] | None
    layers: list[int]
    levels: list[float]
    missing: list[str]
    rewards: np.ndarray | None = None
    advantages: Advantages | None = None
    _maps: dict[tuple[int | None, int | None], np.ndarray] = field(default_factory=dict)

    def maps(self, layer: int | None = None, unit: int | None = None) -> np.ndarray:
        """Allocation maps [T, N, h, w] of mean 1, as the section ``allocation`` makes them.

        Args:
            layer: place in `layers`, or None for the mean over these.
            unit: place in the prompt's units, or None for all of them together.
        """
        if (layer, unit) not in self._maps:
            mass = self.mass.mean(1, dtype=torch.float32) if layer is None else self.mass[:, layer].float()
            mass = mass if unit is None else mass[..., unit : unit + 1]
            allocation = self.config.allocation
            # The masses are on the host, wherever the samples were made.
            plain = self.config.backend == "reference" or sk.available_backends()["cpu"] is not None
            backend = "reference" if plain else "cpu"
            steps = [
                map_of_mass(self.policy, each, self.token_grid, allocation, step, backend)
                for step, each in enumerate(mass)
            ]
            maps = torch.stack(steps)
            self._maps[layer, unit] = (with_last(maps) if allocation.map == "geometric" else maps).numpy()
        return self._maps[layer, unit]


class Explorer:
    """A pipeline from which prompts are sampled, one group at a time.

    Attributes:
        config: its sections evaluation (steps, guidance), model (size), allocation and units are where a page begins.
        reward: what makes advantages, as the configuration's sections reward and train say, or None.
        prompts: suggestions; a prompt of the same text has their metadata, which some rewards need.
        adapted: whether the policy has an adapter, or other weights, that can be left out.
    """

    def __init__(
        self,
        policy: Policy,
        config: Config,
        reward: WeightedSum | None = None,
        prompts: Sequence[Prompt] = (),
        *,
        adapted: bool = False,
    ) -> None:
        self.config, self.reward, self.prompts, self.adapted = config, reward, prompts, adapted
        self._policy = policy
        self._extractor = UnitExtractor(Units(source="rules"))
        self._kept: dict[int, Group] = {}
        self._numbers = itertools.count()

    def prompt(self, text: str) -> Prompt:
        """The prompt of a text, with what is known beside it.

        Raises:
            ConfigError: an empty text.
        """
        text = text.strip()
        if not text:
            raise ConfigError("prompt: expected some text, got none")
        return next((prompt for prompt in self.prompts if prompt.text == text), Prompt(text, {}))

    def units(self, text: str) -> list[str]:
        """A prompt's units: those that stand beside it, or by rule."""
        if not text.strip():
            return []
        prompt = self.prompt(text)
        return list(prompt.units or self._extractor([prompt])[0].units)

    def sample(
        self,
        text: str,
        units: Sequence[str],
        *,
        seed: int = 0,
        count: int = 1,
        steps: int | None = None,
        size: str | None = None,
        guidance_scale: float | None = None,
        base: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> Group:
        """Draw `count` samples of a prompt with the pipeline's own sampler, and record its units in every layer.

        The noise of a sample depends on the seed and its place alone.

        Args:
            text: the prompt.
            units: phrases that stand in it.
            seed: of the noise.
            count: samples, which are each other's group.
            steps, guidance_scale: of the denoising, or None for those of the configuration.
            size: pixels of a side, or "HEIGHT x WIDTH"; None or "" for that of the configuration.
            base: leave out what was trained.
            progress: called with the number of steps that are done, and of all.

        Raises:
            ConfigError: an empty prompt, no units, units that do not stand in it, a size or a guidance scale that the
                model cannot take, or another argument that is out of range.
            RewardError: the reward can tell nothing of the prompt's images.
        """
        prompt = dataclasses.replace(self.prompt(text), units=tuple(dict.fromkeys(units)))
        if not prompt.units:
            raise ConfigError("units: expected at least one phrase of the prompt, got none")
        for unit in prompt.units:
            if not stands_in(prompt.text, unit):
                raise ConfigError(f"units: expected phrases of the prompt, letter by letter, got {unit!r}")
        if not 1 <= count <= MOST_SAMPLES:
            raise ConfigError(f"group: expected 1 to {MOST_SAMPLES} samples, got {count}")
        if seed < 0:
            raise ConfigError(f"seed: expected at least 0, got {seed}")
        config = self._settings(steps, guidance_scale, size)
        with self._policy.base_weights() if base else nullcontext():
            policy = self._policy_for(config)
            return self._draw(policy, config, prompt, seed, count, progress)

    def keep(self, group: Group, instead: int | None = None) -> int:
        """Keep a group in the place of another; returns its number. Of several that stay the oldest is dropped."""
        if instead is not None:
            self._kept.pop(instead, None)
        if len(self._kept) == _MOST_KEPT:
            del self._kept[min(self._kept)]
        number = next(self._numbers)
        self._kept[number] = group
        return number

    def kept(self, number: int) -> Group:
        """The group of a number.

        Raises:
            ConfigError: it is no longer there.
        """
        if number not in self._kept:
            raise ConfigError(f"group: only the newest {_MOST_KEPT} are kept, of all open pages; sample it again")
        return self._kept[number]

    def _settings(self, steps: int | None, guidance_scale: float | None, size: str | None) -> Config:
        config = self.config
        chosen = {"steps": steps, "guidance_scale": guidance_scale}
        overrides = [f"{key}={value}" for key, value in chosen.items() if value is not None]
        evaluation = check_section(Evaluation, config.evaluation.model_dump(), overrides, "evaluation")
        sides = [f"resolution={resolution(size)}"] if size else []
        model = check_section(Model, config.model.model_dump(), sides, "model")
        return config.model_copy(update={"evaluation": evaluation, "model": model})

    def _policy_for(self, config: Config) -> Policy:
        """The policy for pictures of the configuration's size; what it has encoded may depend on that."""
        self._policy.check(config)
        if config.model.resolution == self._policy.config.resolution:
            return self._policy
        section = self._policy.config.model_copy(update={"resolution": config.model.resolution})
        return dataclasses.replace(self._policy, config=section, _cache=OrderedDict())

    def _draw(
        self,
        policy: Policy,
        config: Config,
        prompt: Prompt,
        seed: int,
        count: int,
        progress: Callable[[int, int], object] | None,
    ) -> Group:
        steps, size = config.evaluation.steps, min(config.rollout.batch_size, count)
        places = range(0)
        mass = torch.empty(0)
        latents = []
        token_grid: tuple[int, int] | None = None
        layers: list[int] = []

        def watch(step: int, recorder: sk.AttentionRecorder) -> None:
            nonlocal mass, token_grid, layers
            found = recorder.mass_by_layer  # [L, B, tokens, K]
            if not len(mass):
                mass = torch.empty(steps, len(found), count, *found.shape[2:], dtype=torch.float16)
            mass[step, :, places.start : places.stop] = found.half().cpu()
            token_grid, layers = recorder.grid, recorder.layers
            if progress is not None:
                progress(places.start // size * steps + step + 1, -(-count // size) * steps)

        for first in range(0, count, size):
            places = range(first, min(first + size, count))
            units = text_units(policy, [prompt] * len(places))
            trajectory = denoise(
                policy,
                policy.encode([prompt.text] * len(places)),
                steps=steps,
                kind="ode",
                generator=[stream(seed, "star-explore", place) for place in places],
                guidance_scale=config.evaluation.guidance_scale,
                units=units,
                allocation=config.allocation,
                watch=watch,
                backend=config.backend,
            )
            latents.append(trajectory.latents[-1])
        images = np.concatenate([policy.decode(part) for part in latents])
        rewards, advantages = None, None
        if self.reward is not None:
            each = self.reward.each(images, [prompt] * count)
            rewards = sum_of(config.reward, each)
            alone = config.rollout.model_copy(update={"samples": count})
            advantages = advantages_of(config.model_copy(update={"rollout": alone}), each)
        levels, _ = policy.schedule(steps)
        return Group(
            policy,
            config,
            prompt,
            images,
            mass,
            token_grid,
            layers,
            levels[:-1].tolist(),
            list(units.missing[0]),
            rewards,
            advantages,
        )


def resolution(size: str) -> str:
    """`model.resolution` of a size that is written as "512", "512x768" or "512, 768": height and width.

    Raises:
        ConfigError: it is written otherwise.
    """
    numbers = re.fullmatch(r"\[?\s*(\d+)\s*(?:[x×,]\s*(\d+)\s*)?\]?", size.strip(), re.IGNORECASE)
    if numbers is None:
        raise ConfigError(f"size: expected pixels of a side, or HEIGHT x WIDTH, got {size!r}")
    height, width = numbers.groups()
    return height if width is None else f"[{height}, {width}]"
