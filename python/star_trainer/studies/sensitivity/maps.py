"""Whether a map points at what the reward depends on: at the named objects, and at what changes the reward.

All regions are unions of image tokens. Controls have the statistics of the maps and none of their meaning: `wrong
prompt` is the map of another image, `text-blind` the map's own values in random places.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from star_trainer.families.policy import Policy
from star_trainer.prompts import Prompt
from star_trainer.rewards import DifferentiableReward, RewardFunction
from star_trainer.run.randomness import numpy_stream, stream
from star_trainer.run.state import TrainingState
from star_trainer.run.statistics import student_mean
from star_trainer.sampling import denoise, text_units
from star_trainer.worlds.scenes.oracle import true_mass

CONTROLS = ("wrong prompt", "text-blind")
# A token is part of an object when this much of it is covered.
_COVERED = 0.5


@dataclass(frozen=True)
class Cases:
    """Images [N, H, W, 3] of N prompts, their latents [N, C, H, W], and maps [T, N, h, w] by what was recorded."""

    prompts: list[Prompt]
    images: np.ndarray
    latents: Tensor
    maps: dict[str, np.ndarray]

    @property
    def grid(self) -> tuple[int, int]:
        height, width = next(iter(self.maps.values())).shape[-2:]
        return height, width


def sample_cases(state: TrainingState, prompts: Sequence[Prompt], *, layers: bool) -> Cases:
    """Sample the prompts and record their maps: of the configuration's layers, of each layer alone, and controls."""
    config, policy = state.config, state.policy
    policy.encode_ahead([prompt.text for prompt in prompts])
    recorded = {"map": config.allocation}
    if layers:
        for layer in range(policy.num_layers):
            recorded[f"layer {layer}"] = config.allocation.model_copy(update={"layers": [layer]})
    maps: dict[str, np.ndarray] = {}
    latents: Tensor | None = None
    for name, allocation in recorded.items():
        parts, ends = [], []
        for first in range(0, len(prompts), config.rollout.batch_size):
            batch = list(prompts[first : first + config.rollout.batch_size])
            trajectory = denoise(
                policy,
                policy.encode([prompt.text for prompt in batch]),
                steps=config.rollout.steps,
                kind="ode",
                generator=[stream(config.run.seed, "sensitivity", first + place) for place in range(len(batch))],
                guidance_scale=config.rollout.guidance_scale,
                units=text_units(policy, batch),
                allocation=allocation,
                backend=config.backend,
            )
            assert trajectory.weights is not None, "units were given"
            parts.append(trajectory.weights.float().cpu())
            ends.append(trajectory.latents[-1])
        maps[name] = torch.cat(parts, dim=1).numpy()
        latents = torch.cat(ends) if latents is None else latents
    assert latents is not None, "at least the map is recorded"
    images = np.concatenate([policy.decode(part) for part in latents.split(config.rollout.batch_size)])
    maps["wrong prompt"] = np.roll(maps["map"], 1, axis=1)
    rng = numpy_stream(config.run.seed, "text-blind")
    flat = maps["map"].reshape(*maps["map"].shape[:2], -1)
    maps["text-blind"] = rng.permuted(flat, axis=-1).reshape(maps["map"].shape)
    return Cases(list(prompts), images, latents, maps)


@dataclass(frozen=True)
class Score:
    """A mean over n cases with its 95 % interval (Student's t), of one kind of map at one denoising step."""

    what: str
    map: str
    step: int
    value: float
    low: float
    high: float
    n: int


def mean_score(what: str, name: str, step: int, values: np.ndarray) -> Score:
    """The mean of what is defined: cases with NaN have nothing to compare, and are left out."""
    mean = student_mean(values[np.isfinite(values)])
    return Score(what, name, step, mean.value if mean.n > 1 else math.nan, mean.low, mean.high, mean.n)


def overlap(cases: Cases) -> list[Score]:
    """How well maps tell the tokens of named objects from the others, in images that show both.

    ``object AUROC`` is the probability that a token of an object has more weight than another (0.5: says nothing);
    ``weight on objects`` is the mean weight there (1: as everywhere).
    """
    covered = true_mass(cases.images, cases.prompts, cases.grid).sum(-1).numpy() >= _COVERED
    scores = []
    for name, maps in cases.maps.items():
        for step, weights in enumerate(maps.reshape(len(maps), len(cases.prompts), -1)):
            pairs = [auroc(each, inside) for each, inside in zip(weights, covered, strict=True)]
            gains = [w[c].mean() if c.any() and not c.all() else np.nan for w, c in zip(weights, covered, strict=True)]
            scores.append(mean_score("object AUROC", name, step, np.array(pairs)))
            scores.append(mean_score("weight on objects", name, step, np.array(gains)))
    return scores


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """The probability that a value at `positive` is larger than one elsewhere, ties counting half; NaN without both."""
    if positive.all() or not positive.any():
        return float("nan")
    ranks = stats.rankdata(values)
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(values) - count)))


def edit(images: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Images [N, H, W, 3] with their regions [N, h, w] bool of tokens painted over in the median colour of the rest."""
    scale = images.shape[1] // regions.shape[1]
    pixels = regions.repeat(scale, axis=1).repeat(scale, axis=2)
    edited = images.copy()
    for image, inside in zip(edited, pixels, strict=True):
        if inside.any() and not inside.all():
            image[inside] = np.median(image[~inside], axis=0).astype(np.uint8)
    return edited


def edits(cases: Cases, reward: RewardFunction, share: float, rng: np.random.Generator) -> list[Score]:
    """What the reward loses when the `share` of the image with the most weight is painted over, and other places are.

    Maps that are even point nowhere and are left out.

    ``inside`` is that region; ``outside`` has its shape, moved (round the edges) to where it overlaps the region least;
    ``elsewhere`` moved at random.
    """
    before = reward(cases.images, cases.prompts)
    scores = []
    for name in ("map", *CONTROLS):
        for step, weights in enumerate(cases.maps[name]):
            inside = np.stack([top_region(each, share) for each in weights])
            moves = [rng.permutation(inside[0].size) for _ in inside]
            places = {
                "inside": inside,
                "outside": np.stack([moved(a, _least_overlap(a, m)) for a, m in zip(inside, moves, strict=True)]),
                "elsewhere": np.stack([moved(a, int(m[0])) for a, m in zip(inside, moves, strict=True)]),
            }
            for place, regions in places.items():
                lost = before - reward(edit(cases.images, regions), cases.prompts)
                lost = np.where(np.ptp(weights, axis=(1, 2)) > 0, lost, np.nan)
                scores.append(mean_score(f"reward lost {place}", name, step, lost))
    return scores


def top_region(weights: np.ndarray, share: float) -> np.ndarray:
    """The tokens [h, w] bool with the most weight, as many as make up `share` of all (at least one)."""
    count = max(1, round(share * weights.size))
    region = np.zeros(weights.size, dtype=bool)
    region[np.argsort(-weights, axis=None, kind="stable")[:count]] = True
    return region.reshape(weights.shape)


def moved(region: np.ndarray, offset: int) -> np.ndarray:
    """`region` [h, w] moved round the edges by offset // w rows and offset % w columns."""
    rows, columns = divmod(offset, region.shape[1])
    return np.roll(region, (rows, columns), (0, 1))


def farthest(region: np.ndarray) -> np.ndarray:
    """`region` moved to where it overlaps itself least, the nearest such place in reading order."""
    return moved(region, _least_overlap(region, np.arange(region.size)))


def _least_overlap(region: np.ndarray, offsets: np.ndarray) -> int:
    return int(min(offsets, key=lambda offset: int((moved(region, int(offset)) & region).sum())))


def regional_correlation(cases: Cases, reward: RewardFunction, most: int = 4) -> list[Score]:
    """Spearman's correlation, over at most `most` x `most` regions, of a region's weight and what its loss costs.

    Images whose reward no region changes have no correlation and are left out.
    """
    height, width = cases.grid
    blocks = _blocks(cases, most)
    before = reward(cases.images, cases.prompts)
    lost = np.zeros((len(before), blocks, blocks))
    for row in range(blocks):
        for column in range(blocks):
            region = np.zeros((len(before), blocks, blocks), dtype=bool)
            region[:, row, column] = True
            region = region.repeat(height // blocks, axis=1).repeat(width // blocks, axis=2)
            lost[:, row, column] = before - reward(edit(cases.images, region), cases.prompts)
    return _correlations("correlation with reward lost", cases, lost, blocks)


def gradient_correlation(cases: Cases, policy: Policy, reward: DifferentiableReward, most: int = 8) -> list[Score]:
    """Spearman's correlation of a region's weight and the length there of the reward's gradient by the final latent."""
    latents = cases.latents.clone().requires_grad_()
    for part, prompts in zip(latents.split(16), _chunks(cases.prompts, 16), strict=True):
        reward(policy.pixels(part), [prompt.text for prompt in prompts]).sum().backward()
    assert latents.grad is not None, "the reward depends on the latents"
    lengths, blocks = latents.grad.float().norm(dim=1), _blocks(cases, most)
    regions = torch.nn.functional.adaptive_avg_pool2d(lengths[:, None], blocks)[:, 0]
    return _correlations("correlation with the reward's gradient", cases, regions.cpu().numpy(), blocks)


def _blocks(cases: Cases, most: int) -> int:
    """As many regions per side as divide the grid, at most `most`."""
    return next(count for count in range(most, 0, -1) if all(side % count == 0 for side in cases.grid))


def _correlations(what: str, cases: Cases, target: np.ndarray, blocks: int) -> list[Score]:
    height, width = cases.grid
    scores = []
    for name in ("map", *CONTROLS):
        for step, weights in enumerate(cases.maps[name]):
            pooled = weights.reshape(len(weights), blocks, height // blocks, blocks, width // blocks).mean((2, 4))
            values = [_spearman(a.ravel(), b.ravel()) for a, b in zip(pooled, target, strict=True)]
            scores.append(mean_score(what, name, step, np.array(values)))
    return scores


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(stats.spearmanr(first, second).statistic)


def _chunks(items: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def as_rows(scores: Sequence[Score]) -> list[dict[str, object]]:
    return [dataclasses.asdict(score) for score in scores]
