"""Similarity of an image and its prompt by a CLIP-class model of transformers: CLIP score and PickScore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from star_trainer.config import ConfigError
from star_trainer.config.paths import TINY_CLIP, folder_or_name
from star_trainer.families.devices import own_device
from star_trainer.families.loading import load_whole
from star_trainer.prompts import Prompt

_AT_ONCE = 32


class ClipModel:
    """A model with an image tower and a text tower in one space, and its processor; frozen, in float32.

    Args:
        model: 'tiny' (comes with the package), a folder, or a name on a model hub, with weights in safetensors.
        processor: where the processor comes from, by default `model`.
        key: the setting that is named when something is wrong.

    Raises:
        ConfigError: it cannot be loaded whole, is no CLIP, or prepares images in a way that `pixels` does not know.
    """

    def __init__(self, model: str, processor: str | None = None, *, key: str) -> None:
        from transformers import AutoProcessor, CLIPModel

        self.device = own_device()
        place = _place(model, key)
        try:
            self.model = load_whole(CLIPModel, place).float().to(self.device).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: {model} cannot be used: {error}") from error
        if processor is not None:
            model, key = processor, f"{key}_processor"
            place = _place(model, key)
        try:
            self.processor = AutoProcessor.from_pretrained(place)
            self.preparation = _Preparation(self.processor.image_processor)
        except (AttributeError, OSError, ValueError) as error:
            raise ConfigError(f"{key}: {model} cannot be used: {error}") from error
        self.model.requires_grad_(False)

    @property
    def logit_scale(self) -> float:
        """What the model was trained to multiply similarities by."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[B, D] of length 1."""
        tokens = self.processor.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return functional.normalize(self.model.text_projection(pooled), dim=-1)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """[B, D] of length 1 from what the processor makes of images, [B, 3, h, w]."""
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return functional.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def embed_images(self, images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        """[B, D] of length 1 from B images [H, W, 3] uint8 of any sizes, at most 32 in one pass."""
        parts = [images[first : first + _AT_ONCE] for first in range(0, len(images), _AT_ONCE)]
        return torch.cat([self.embed_pixels(self.preparation.of_bytes(part)) for part in parts])

    def pixels(self, images: Tensor) -> Tensor:
        """What the processor makes of images [B, 3, H, W] in [0, 1], differentiably: [B, 3, h, w]."""
        return self.preparation(images.to(self.device))


def _place(name: str, key: str) -> str:
    return str(TINY_CLIP) if name == "tiny" else folder_or_name(name, key)


class _Preparation:
    """What a CLIP image processor makes of images, with a gradient.

    The values are the processor's own, which works on bytes and rounds before and after resizing. The gradient is that
    of the same resizing, cropping and normalising without the rounding.
    """

    def __init__(self, processor: Any) -> None:
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        if lacking := [step for step in steps if not getattr(processor, step, False)]:
            raise ValueError(f"its image processor leaves out {', '.join(lacking)}")
        if processor.resample != Image.Resampling.BICUBIC:
            raise ValueError(f"its image processor resizes with filter {processor.resample}, not bicubic (3)")
        size, crop = dict(processor.size), dict(processor.crop_size)
        self.processor = processor
        self.shortest = size.get("shortest_edge")
        self.size = None if self.shortest else (size["height"], size["width"])
        self.crop = crop["height"], crop["width"]
        self.mean = torch.tensor(processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        smooth = self.without_rounding(images)
        levels = (images.detach().float().clamp(0, 1) * 255).round().byte()
        exact = self.of_bytes(levels.permute(0, 2, 3, 1).cpu().numpy()).to(smooth.device)
        return smooth + (exact - smooth).detach()

    def of_bytes(self, images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        """[B, 3, h, w] from B images [H, W, 3] uint8 of any sizes."""
        # One by one: a narrow crop is large before its ends are cut, many of them would be at once.
        pictures = [Image.fromarray(image) for image in images]
        return torch.cat([self.processor(images=picture, return_tensors="pt")["pixel_values"] for picture in pictures])

    def without_rounding(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] from images [B, 3, H, W] in [0, 1]."""
        height, width = self._resized(*images.shape[-2:])
        resized = functional.interpolate(
            images.float().clamp(0, 1), (height, width), mode="bicubic", antialias=True
        ).clamp(0, 1)
        # A crop that is larger than the image is filled with black, as negative padding it cuts.
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        below, right = height - self.crop[0] - top, width - self.crop[1] - left
        cropped = functional.pad(resized, (-left, -right, -top, -below))
        return (cropped - self.mean.to(cropped.device)) / self.std.to(cropped.device)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        assert self.shortest is not None
        short, long = min(height, width), max(height, width)
        stretched = int(self.shortest * long / short)
        return (self.shortest, stretched) if height <= width else (stretched, self.shortest)


class ClipReward:
    """The cosine between an image's and its prompt's embedding, times 100 or times the model's own scale.

    Called with images [B, H, W, 3] uint8 and their prompts; returns [B] float64. ``scale="percent"`` is the CLIP score
    (without its floor at 0, which would have no gradient), ``scale="logit"`` with PickScore's model is PickScore.
    """

    def __init__(self, model: ClipModel, *, scale: Literal["percent", "logit"]) -> None:
        self.model = model
        self.factor = 100.0 if scale == "percent" else model.logit_scale

    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        scores = []
        for first in range(0, len(prompts), _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            texts = self.model.embed_texts([prompt.text for prompt in prompts[rows]])
            scores.append(self.factor * (self.model.embed_images(images[rows]) * texts).sum(-1))
        return torch.cat(scores).double().cpu().numpy()

    def differentiable(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The same reward, [B], with a gradient with respect to images [B, 3, H, W] in [0, 1]."""
        embedded = self.model.embed_pixels(self.model.pixels(images))
        return self.factor * (embedded * self.model.embed_texts(texts)).sum(-1)
