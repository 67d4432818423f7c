"""Held-out evaluation: the same prompts and the same noise every time, no sampler noise, paired comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from scipy import stats

from star_trainer.config import Config
from star_trainer.files import write_atomically
from star_trainer.policy import Policy
from star_trainer.randomness import stream
from star_trainer.rewards import RewardFunction
from star_trainer.rollout import denoise
from star_trainer.scenes import ScenePrompt


@dataclass(frozen=True)
class Evaluation:
    """Images [N, H, W, 3] uint8 of N held-out prompts, and each image's score [N] by reward name."""

    images: np.ndarray
    scores: dict[str, np.ndarray]

    def means(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.scores.items()}

    def save(self, path: Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        tensors = {f"score/{name}": torch.from_numpy(values) for name, values in self.scores.items()}
        write_atomically(path, save({"images": torch.from_numpy(self.images), **tensors}))

    @classmethod
    def load(cls, path: Path) -> Evaluation | None:
        """Read what `save` wrote; None where it is missing or cannot be read."""
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError):
            return None
        if "images" not in tensors:
            return None
        scores = {name.removeprefix("score/"): t.numpy() for name, t in tensors.items() if name != "images"}
        return cls(tensors["images"].numpy(), scores)


def evaluate(
    policy: Policy, config: Config, prompts: Sequence[ScenePrompt], scorers: dict[str, RewardFunction]
) -> Evaluation:
    """Sample one image per prompt with the pipeline's own (noise-free) sampler and score it.

    The noise of a prompt depends on its place in the list alone: evaluations of fewer prompts see the same noise, and
    the same images up to rounding.
    """
    images = []
    batch = config.rollout.batch_size
    for chunk, first in enumerate(range(0, len(prompts), batch)):
        embeddings = policy.encode([prompt.text for prompt in prompts[first : first + batch]])
        trajectory = denoise(
            policy,
            embeddings,
            steps=config.evaluation.steps,
            kind="ode",
            generator=stream(config.run.seed, "evaluation", chunk),
            guidance_scale=config.evaluation.guidance_scale,
            backend=config.backend,
        )
        images.append(policy.decode(trajectory.latents[-1]))
    stacked = np.concatenate(images)
    return Evaluation(stacked, {name: scorer(stacked, prompts) for name, scorer in scorers.items()})


@dataclass(frozen=True)
class PairedDifference:
    """Mean of after − before over the same prompts, with its 95 % interval and p-value (paired t-test)."""

    mean: float
    low: float
    high: float
    p_value: float


def paired_difference(before: np.ndarray, after: np.ndarray) -> PairedDifference:
    """Compare two scores of the same N prompts.

    Raises:
        ValueError: fewer than two pairs, or lengths that differ.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) < 2:
        raise ValueError(
            f"after: expected the shape of before, [N >= 2], got {list(before.shape)}, {list(after.shape)}"
        )
    difference = after.astype(np.float64) - before
    if np.ptp(difference) == 0.0:
        # Without any spread the t statistic is 0/0; the interval is the point itself.
        value = float(difference[0])
        return PairedDifference(value, value, value, 1.0 if value == 0.0 else 0.0)
    result = stats.ttest_1samp(difference, 0.0)
    interval = result.confidence_interval(0.95)
    return PairedDifference(float(difference.mean()), float(interval.low), float(interval.high), float(result.pvalue))
