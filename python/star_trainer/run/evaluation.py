"""Held-out evaluation: the same prompts and the same noise every time, no sampler noise, paired comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from scipy import stats

from star_trainer.config import Config
from star_trainer.families.policy import Policy
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardError, RewardFunction
from star_trainer.run.files import write_atomically
from star_trainer.run.processes import gather_array, together
from star_trainer.run.randomness import stream
from star_trainer.sampling import denoise


@dataclass(frozen=True)
class Evaluation:
    """Scores [N] of N held-out prompts' images by reward name, and the first few of the images [n, H, W, 3] uint8."""

    images: np.ndarray
    scores: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.scores.values())))

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
    policy: Policy,
    config: Config,
    prompts: Sequence[Prompt],
    scorers: dict[str, RewardFunction],
    accelerator: Accelerator,
) -> Evaluation:
    """Sample one image per prompt with the pipeline's own (noise-free) sampler and score it.

    The noise of a prompt depends on its place in the list alone: evaluations of fewer prompts, or by more processes,
    see the same noise, and the same images up to rounding. The first ``evaluation.pictures`` images are kept.

    Raises:
        RewardError: a score that cannot be had, in this or another process.
    """
    # As many prompts for each process, so that all run the model equally often; the last process may repeat some.
    share = -(-len(prompts) // accelerator.num_processes)
    own = [min(accelerator.process_index * share + i, len(prompts) - 1) for i in range(share)]
    policy.encode_ahead([prompts[place].text for place in own])
    images: list[np.ndarray] = []
    scores: dict[str, list[np.ndarray]] = {name: [] for name in scorers}
    for first in range(0, share, config.rollout.batch_size):
        places = own[first : first + config.rollout.batch_size]
        batch = [prompts[place] for place in places]
        trajectory = denoise(
            policy,
            policy.encode([prompt.text for prompt in batch]),
            steps=config.evaluation.steps,
            kind="ode",
            generator=[stream(config.run.seed, "evaluation", place) for place in places],
            guidance_scale=config.evaluation.guidance_scale,
            backend=config.backend,
        )
        decoded = policy.decode(trajectory.latents[-1])
        images.append(decoded[: max(0, config.evaluation.pictures - first)])
        judge = partial(_score, decoded, batch, scorers)
        for name, values in together(accelerator, judge, RewardError).items():
            scores[name].append(values)
    shown = gather_array(accelerator, np.concatenate(images))[: min(config.evaluation.pictures, len(prompts))]
    gathered = {name: gather_array(accelerator, np.concatenate(parts)) for name, parts in scores.items()}
    return Evaluation(shown, {name: values[: len(prompts)] for name, values in gathered.items()})


def _score(images: np.ndarray, prompts: Sequence[Prompt], scorers: dict[str, RewardFunction]) -> dict[str, np.ndarray]:
    return {name: np.asarray(scorer(images, prompts), dtype=np.float64) for name, scorer in scorers.items()}


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
        # Without any spread the t statistic is 0/0: nothing differs at all, or there is no telling how sure that is.
        value = float(difference[0])
        return PairedDifference(value, *((0.0, 0.0, 1.0) if value == 0.0 else (math.nan,) * 3))
    result = stats.ttest_1samp(difference, 0.0)
    interval = result.confidence_interval(0.95)
    return PairedDifference(float(difference.mean()), float(interval.low), float(interval.high), float(result.pvalue))
