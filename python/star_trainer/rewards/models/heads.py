"""The head that ImageReward and LAION's aesthetic predictor share, and the latter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from star_trainer.config import ConfigError
from star_trainer.prompts import Prompt
from star_trainer.rewards.models.clip import ClipModel
from star_trainer.rewards.models.preparation import check_size

AESTHETIC_HEAD = "head.safetensors"


def linear_head(width: int) -> nn.Sequential:
    """From [B, width] to [B, 1] through 1024, 128, 64 and 16, with nothing between that is not linear."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


class AestheticReward:
    """LAION's aesthetic score: a linear head on an image's embedding of length 1; prompts do not count.

    Called with images [B, H, W, 3] uint8 and their prompts; returns [B] float64, on the scale 1 to 10 of the ratings
    that it was trained on.

    Args:
        clip: CLIP ViT-L/14.
        head: a folder that `star-convert-reward` has written.

    Raises:
        ConfigError: the head cannot be read, or is for another CLIP.
    """

    def __init__(self, clip: ClipModel, head: str) -> None:
        self.clip = clip
        width = clip.model.config.projection_dim
        self.head = linear_head(width)
        path = Path(head) / AESTHETIC_HEAD
        try:
            self.head.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ConfigError(
                f"reward.models.aesthetic: {path} cannot be used with embeddings of width {width}: {error}"
            ) from error
        self.head.to(clip.device, torch.float64 if clip.dtype == torch.float64 else torch.float32).eval()
        self.head.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        check_size(*images.shape[1:3])
        return self.head(self.clip.embed_images(images)).squeeze(1).double().cpu().numpy()

    def differentiable(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The same reward, [B], with a gradient with respect to images [B, 3, H, W] in [0, 1]."""
        return self.head(self.clip.embed_pixels(self.clip.pixels(images))).squeeze(1)
