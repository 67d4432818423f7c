"""Group-relative advantages, and the maps that the controls put in the place of STAR's.

See docs/method.md, sections 1 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from star_trainer.config import Config
from star_trainer.rewards import sum_of

EPSILON = 1e-4
# A group whose rewards differ by less than this tells nothing apart.
MINIMUM_SPREAD = 1e-8


@dataclass(frozen=True)
class Advantages:
    """`values` [B]; `kept` [B] bool: samples of groups with spread; `dropped` is the fraction of groups without."""

    values: np.ndarray
    kept: np.ndarray
    dropped: float


def group_advantages(rewards: np.ndarray, group_size: int, *, std: str = "group", clip: float = 5.0) -> Advantages:
    """A = (reward − group mean) / (std + 1e-4), clipped to ±clip.

    Args:
        rewards: [B], groups of `group_size` next to each other.
        group_size: samples per prompt.
        std: ``group`` or ``batch``: over what the standard deviation is taken.
        clip: largest absolute value.

    Raises:
        ValueError: a length that is not a multiple of `group_size`, non-finite rewards, an unknown `std`.
    """
    if rewards.ndim != 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"rewards: expected whole groups of {group_size}, got shape {list(rewards.shape)}")
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards: expected finite numbers, got {rewards[~np.isfinite(rewards)][0]}")
    if std not in ("group", "batch"):
        raise ValueError(f"std: expected one of group, batch, got {std!r}")
    groups = rewards.reshape(-1, group_size)
    spread = groups.std(axis=1, keepdims=True)
    scale = spread if std == "group" else rewards.std()
    values = (groups - groups.mean(axis=1, keepdims=True)) / (scale + EPSILON)
    has_spread = np.broadcast_to(spread > MINIMUM_SPREAD, groups.shape)
    return Advantages(
        np.clip(values, -clip, clip).reshape(-1),
        has_spread.reshape(-1).copy(),
        float((spread <= MINIMUM_SPREAD).mean()),
    )


def advantages_of(config: Config, rewards: np.ndarray) -> Advantages:
    """The advantages of an iteration's samples, as the configuration combines their rewards.

    Args:
        config: its `reward` and `train`.
        rewards: [B], groups next to each other, or [B, K] for what each of K terms counts, without its weight.

    Raises:
        ValueError: as of `group_advantages`.
    """
    size, spread, clip = config.rollout.samples, config.train.advantage_std, config.train.advantage_clip
    if rewards.ndim == 1:
        return group_advantages(rewards, size, std=spread, clip=clip)
    if config.reward.combine == "sum":
        if config.reward.normalize == "batch":
            rewards = (rewards - rewards.mean(axis=0)) / (rewards.std(axis=0) + EPSILON)
        return group_advantages(sum_of(config.reward, rewards), size, std=spread, clip=clip)
    # GDPO (arXiv 2601.05242): each term is compared within its groups by itself, and their sum has deviation 1 over the
    # batch, however many they are.
    each = [group_advantages(column, size, std=spread, clip=np.inf).values for column in rewards.T]
    total = sum_of(config.reward, np.stack(each, axis=1))
    kept = np.abs(total.reshape(-1, size)).max(axis=1) > MINIMUM_SPREAD
    values = np.clip(total / (total.std() + EPSILON), -clip, clip)
    return Advantages(values, np.repeat(kept, size), float(1 - kept.mean()))


def control_weights(method: str, weights: Tensor | None, group_size: int, rng: np.random.Generator) -> Tensor | None:
    """The maps that a method uses, from STAR's (or the oracle's own) [T, B, h, w]; None is w = 1.

    ``shuffled`` gives every sample the map of another prompt's sample, step by step; ``inverted`` mirrors each
    map between its smallest and largest value and scales its mean back to 1.

    Raises:
        ValueError: an unknown method, ``shuffled`` with a single group, or a method whose maps are missing.
    """
    if method in ("uniform", "uniform_position"):
        return None
    if weights is None:
        raise ValueError(f"weights: expected the recorded maps for the method {method}, got None")
    if method in ("star", "oracle"):
        return weights
    if method == "shuffled":
        groups = weights.shape[1] // group_size
        if groups < 2:
            raise ValueError("weights: expected at least two groups, whose maps can be exchanged, got one")
        order = rng.permutation(groups)
        # Along one cycle through all groups no group keeps its own maps.
        source = np.empty(groups, dtype=np.int64)
        source[order] = np.roll(order, 1)
        rows = source[:, None] * group_size + rng.permuted(np.tile(np.arange(group_size), (groups, 1)), axis=1)
        return weights[:, torch.from_numpy(rows.reshape(-1)).to(weights.device)]
    if method == "inverted":
        flat = weights.flatten(2)
        mirrored = flat.amin(-1, keepdim=True) + flat.amax(-1, keepdim=True) - flat
        return (mirrored / mirrored.mean(-1, keepdim=True)).view_as(weights)
    raise ValueError(f"method: expected star, uniform, uniform_position, shuffled, inverted or oracle, got {method!r}")
