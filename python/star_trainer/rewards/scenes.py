"""Rewards of the scenes world: whether, or how far, an image meets what its prompt asks for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from star_trainer.prompts import Prompt
from star_trainer.worlds.requirements import judge
from star_trainer.worlds.scenes.detector import detect


def scene_strict(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """1 where an image meets every requirement of its prompt, else 0. Images [B, H, W, 3] uint8; returns [B]."""
    return np.array([judge(detect(i), p.metadata).strict for i, p in zip(images, prompts, strict=True)])


def scene_graded(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """The fraction of its prompt's requirements that an image meets. Images [B, H, W, 3] uint8; returns [B]."""
    return np.array([judge(detect(i), p.metadata).graded for i, p in zip(images, prompts, strict=True)])
