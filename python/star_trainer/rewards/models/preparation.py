"""What an image processor makes of images, with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from star_trainer.rewards.errors import RewardError

SMALLEST = 8  # pixels of a side


class Preparation:
    """What a CLIP image processor makes of images, with a gradient.

    Args:
        processor: of transformers.
        rounding: the values are the processor's own, which works on bytes and rounds before and after resizing; the
            gradient is that of the same resizing, cropping and normalising without the rounding. False leaves the
            rounding out of the values, too.

    Raises:
        ValueError: the processor prepares images in another way.
    """

    def __init__(self, processor: Any, *, rounding: bool = True) -> None:
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        if lacking := [step for step in steps if not getattr(processor, step, False)]:
            raise ValueError(f"its image processor leaves out {', '.join(lacking)}")
        if processor.resample != Image.Resampling.BICUBIC:
            raise ValueError(f"its image processor resizes with filter {processor.resample}, not bicubic (3)")
        size, crop = dict(processor.size), dict(processor.crop_size)
        self.processor = processor
        self.rounding = rounding
        self.shortest = size.get("shortest_edge")
        self.size = None if self.shortest else (size["height"], size["width"])
        self.crop = crop["height"], crop["width"]
        self.mean = torch.tensor(processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] from images [B, 3, H, W] in [0, 1].

        Raises:
            RewardError: images of fewer than 8 pixels a side.
        """
        check_size(*images.shape[-2:])
        smooth = self.without_rounding(images)
        if not self.rounding:
            return smooth
        levels = (images.detach().float().clamp(0, 1) * 255).round().byte()
        exact = self.of_bytes(levels.permute(0, 2, 3, 1).cpu().numpy()).to(smooth)
        return smooth + (exact - smooth).detach()

    def of_bytes(self, images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        """[B, 3, h, w] from B images [H, W, 3] uint8 of any sizes, on the CPU."""
        if not self.rounding:
            parts = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] for image in images]
            return torch.cat([self.without_rounding(part.float() / 255) for part in parts])
        # One by one: a narrow crop is large before its ends are cut, many of them would be at once.
        pictures = [Image.fromarray(image) for image in images]
        return torch.cat([self.processor(images=picture, return_tensors="pt")["pixel_values"] for picture in pictures])

    def without_rounding(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] from images [B, 3, H, W] in [0, 1]."""
        height, width = self._resized(*images.shape[-2:])
        images = wide(images).clamp(0, 1)
        resized = functional.interpolate(images, (height, width), mode="bicubic", antialias=True)
        if self.rounding:
            # Bytes cut off what bicubic resizing puts beyond black and white.
            resized = resized.clamp(0, 1)
        # A crop that is larger than the image is filled with black, as negative padding it cuts.
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        below, right = height - self.crop[0] - top, width - self.crop[1] - left
        cropped = functional.pad(resized, (-left, -right, -top, -below))
        return (cropped - self.mean.to(cropped)) / self.std.to(cropped)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        assert self.shortest is not None
        short, long = min(height, width), max(height, width)
        stretched = int(self.shortest * long / short)
        return (self.shortest, stretched) if height <= width else (stretched, self.shortest)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_size(height: int, width: int, smallest: int = SMALLEST) -> None:
    """Refuse images that are too small to be told anything of.

    Raises:
        RewardError: a side of fewer than `smallest` pixels.
    """
    if min(height, width) < smallest:
        raise RewardError(f"images: expected at least {smallest} pixels a side, got {height}x{width}")
