"""Rewards of one's own, as `module:function`: how bright an image is, so that no two samples are alike."""

from __future__ import annotations

import os
import time

import numpy as np
from star_trainer.rewards import RewardError


def brightness(images: np.ndarray, prompts) -> np.ndarray:
    return images.astype(np.float64).mean(axis=(1, 2, 3)) / 255.0


def not_a_number(images: np.ndarray, prompts) -> np.ndarray:
    return np.full(len(images), np.nan)


def one_group(images: np.ndarray, prompts) -> np.ndarray:
    """Tells apart the samples of about every fourth prompt alone."""
    told_apart = np.array([sum(prompt.text.encode()) % 4 == 1 for prompt in prompts])
    return np.where(told_apart, brightness(images, prompts), 0.5)


_calls = 0


def hangs_in_the_last_process(images: np.ndarray, prompts) -> np.ndarray:
    """Works for the base model's evaluation and the first iteration."""
    global _calls
    _calls += 1
    if _calls > 4 and os.environ["RANK"] == "1":
        time.sleep(3600)
    return brightness(images, prompts)


def fails_in_the_last_process(images: np.ndarray, prompts) -> np.ndarray:
    """Works for the base model's evaluation and the first iteration."""
    global _calls
    _calls += 1
    if _calls > 4 and os.environ["RANK"] == "1":
        raise RewardError("the reward is gone")
    return brightness(images, prompts)
