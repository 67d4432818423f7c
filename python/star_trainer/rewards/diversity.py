"""How much the images of one prompt differ, which is what reward hacking loses first. A metric, no reward."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from star_trainer.rewards.models.clip import ClipModel

# Of images [P, G, H, W, 3] uint8, G of each prompt: [P].
Diversity = Callable[[np.ndarray], np.ndarray]


class ClipDiversity:
    """The mean over pairs of a prompt's images of 1 less the cosine of their CLIP embeddings, in [0, 2]."""

    def __init__(self, clip: ClipModel) -> None:
        self.clip = clip

    def __call__(self, images: np.ndarray) -> np.ndarray:
        prompts, size = images.shape[:2]
        embedded = self.clip.embed_images(images.reshape(-1, *images.shape[2:])).double().view(prompts, size, -1)
        # Of all ordered pairs those of an image with itself add up to the size.
        cosines = (embedded.sum(1).square().sum(-1) - size) / (size * (size - 1))
        return (1 - cosines).cpu().numpy()
