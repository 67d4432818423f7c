"""Allocation maps from the truth instead of from attention, which the scenes world alone has: an upper bound.

See docs/method.md, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import star_kernels as sk
from star_trainer.config import Allocation
from star_trainer.prompts import Prompt
from star_trainer.worlds.scenes.detector import detect_masks


def true_mass(images: np.ndarray, prompts: Sequence[Prompt], grid: tuple[int, int]) -> Tensor:
    """What part of each image token the objects that the prompt names cover, one unit per class named.

    Args:
        images: [B, H, W, 3] uint8, with H and W multiples of the grid's.
        prompts: B prompts of the scenes world; `include` of their metadata names the classes.
        grid: image tokens per column and row, (h, w).

    Returns:
        [B, h·w, K] float32; a class that is not in the image has no mass.
    """
    height, width = grid
    named = [list(dict.fromkeys(item["class"] for item in prompt.metadata["include"])) for prompt in prompts]
    mass = np.zeros((len(prompts), height, width, max(len(classes) for classes in named)), dtype=np.float32)
    for sample, (image, classes) in enumerate(zip(images, named, strict=True)):
        for found, mask in detect_masks(image):
            if found.name in classes:
                tokens = mask.reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
                mass[sample, :, :, classes.index(found.name)] += tokens.mean((1, 3))
    return torch.from_numpy(mass).flatten(1, 2)


def true_maps(
    images: np.ndarray, prompts: Sequence[Prompt], grid: tuple[int, int], allocation: Allocation, steps: int
) -> Tensor:
    """`true_mass` as weights [steps, B, h, w] of mean 1, by the settings that attention mass goes through."""
    mass = true_mass(images, prompts, grid)
    return torch.stack([sk.allocation_map(mass, grid, **allocation.options(step)) for step in range(steps)])
