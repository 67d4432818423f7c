"""Similarity of an image and its prompt by a CLIP-class model of transformers: CLIP score, PickScore and HPS v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from star_trainer.config import ConfigError
from star_trainer.config.paths import TINY_CLIP, TINY_PICKSCORE, folder_or_name
from star_trainer.families.devices import own_device
from star_trainer.families.loading import load_whole
from star_trainer.prompts import Prompt
from star_trainer.rewards.models.preparation import Preparation, check_size, wide

AT_ONCE = 32


class ClipModel:
    """A model with an image tower and a text tower in one space, and its processor; frozen.

    Args:
        model: 'tiny' (comes with the package), a folder, or a name on a model hub, with weights in safetensors.
        processor: where the processor comes from, by default `model`.
        key: the setting that is named when something is wrong.
        dtype: of the weights; embeddings are scaled and compared in float32 at least.
        rounding: whether images are rounded to bytes as they are resized; see `Preparation`.

    Raises:
        ConfigError: it cannot be loaded whole, is no CLIP, or prepares images in a way that `pixels` does not know.
    """

    def __init__(
        self,
        model: str,
        processor: str | None = None,
        *,
        key: str,
        dtype: torch.dtype = torch.float32,
        rounding: bool = True,
    ) -> None:
        from transformers import AutoProcessor, CLIPModel

        self.device, self.dtype = own_device(), dtype
        place = _place(model, key)
        try:
            whole = load_whole(CLIPModel, place)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: {model} cannot be used: {error}") from error
        # What the model was trained to multiply similarities by; bfloat16 would round its logarithm, by up to 2 %.
        self.logit_scale = wide(whole.logit_scale).exp().item()
        self.model = whole.to(self.device, dtype).eval()
        if processor is not None:
            model, key = processor, f"{key}_processor"
            place = _place(model, key)
        try:
            self.processor = AutoProcessor.from_pretrained(place)
            self.preparation = Preparation(self.processor.image_processor, rounding=rounding)
        except (AttributeError, OSError, ValueError) as error:
            raise ConfigError(f"{key}: {model} cannot be used: {error}") from error
        self.model.requires_grad_(False)

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
        return functional.normalize(wide(self.model.text_projection(pooled)), dim=-1)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """[B, D] of length 1 from what the processor makes of images, [B, 3, h, w]."""
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
        return functional.normalize(wide(self.model.visual_projection(pooled)), dim=-1)

    @torch.no_grad()
    def embed_images(self, images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        """[B, D] of length 1 from B images [H, W, 3] uint8 of any sizes, at most 32 in one pass."""
        parts = [images[first : first + AT_ONCE] for first in range(0, len(images), AT_ONCE)]
        return torch.cat([self.embed_pixels(self.preparation.of_bytes(part)) for part in parts])

    def pixels(self, images: Tensor) -> Tensor:
        """What the processor makes of images [B, 3, H, W] in [0, 1], differentiably: [B, 3, h, w]."""
        return self.preparation(images.to(self.device))


def _place(name: str, key: str) -> str:
    if name != "tiny":
        return folder_or_name(name, key)
    return str(TINY_PICKSCORE if key.startswith("reward.models.pickscore") else TINY_CLIP)


class ClipReward:
    """The cosine between an image's and its prompt's embedding, as it is, times 100, or times the model's own scale.

    Called with images [B, H, W, 3] uint8 and their prompts; returns [B] float64. ``scale="percent"`` is the CLIP score
    (without its floor at 0, which would have no gradient), ``scale="logit"`` with PickScore's model is PickScore, and
    ``scale="cosine"`` with HPS v2's is HPS v2.
    """

    def __init__(self, model: ClipModel, *, scale: Literal["cosine", "percent", "logit"]) -> None:
        self.model = model
        self.factor = {"cosine": 1.0, "percent": 100.0, "logit": model.logit_scale}[scale]

    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        check_size(*images.shape[1:3])
        scores = []
        for first in range(0, len(prompts), AT_ONCE):
            rows = slice(first, first + AT_ONCE)
            texts = self.model.embed_texts([prompt.text for prompt in prompts[rows]])
            scores.append(self.factor * (self.model.embed_images(images[rows]) * texts).sum(-1))
        return torch.cat(scores).double().cpu().numpy()

    def differentiable(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The same reward, [B], with a gradient with respect to images [B, 3, H, W] in [0, 1]."""
        embedded = self.model.embed_pixels(self.model.pixels(images))
        return self.factor * (embedded * self.model.embed_texts(texts)).sum(-1)
