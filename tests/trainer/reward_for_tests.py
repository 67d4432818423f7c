"""A reward of one's own, as `module:function`: how bright an image is, so that no two samples are alike."""

from __future__ import annotations

import numpy as np


def brightness(images: np.ndarray, prompts) -> np.ndarray:
    return images.astype(np.float64).mean(axis=(1, 2, 3)) / 255.0


def not_a_number(images: np.ndarray, prompts) -> np.ndarray:
    return np.full(len(images), np.nan)
