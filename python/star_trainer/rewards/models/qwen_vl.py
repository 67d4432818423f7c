"""Scorers on Qwen2-VL, such as HPSv3 (arXiv 2508.03789): a head rates what the model has at a token for the rating."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from star_trainer.config import ConfigError
from star_trainer.config.paths import folder_or_name
from star_trainer.families.devices import own_device
from star_trainer.families.loading import load_whole
from star_trainer.prompts import Prompt
from star_trainer.rewards.models.preparation import check_size, wide

REWARD_TOKEN = "<|Reward|>"
TEMPLATE = "template.txt"
PLACE_OF_PROMPT = "{text_prompt}"
_AT_ONCE = 8


class Qwen2VLRewardModel(Qwen2VLForConditionalGeneration):
    """Qwen2-VL with HPSv3's head: mean and log-variance of the score at each token."""

    config_class = Qwen2VLConfig
    # The head is published in float32, whatever the others are.
    _keep_in_fp32_modules_strict = {"rm_head"}

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.rm_head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
        self.post_init()


class QwenVLReward:
    """The mean score of a Qwen2-VL scorer at its rating token; about 0 to 15 with HPSv3, more being better.

    Called with images [B, H, W, 3] uint8 and their prompts; returns [B] float64.

    Args:
        model: a folder that `star-convert-reward hps3` has written.
        dtype: of the weights; the head's are in float32 at least.

    Raises:
        ConfigError: it cannot be loaded whole, or its template lacks the prompt's place or the rating token.
    """

    def __init__(self, model: str, *, dtype: torch.dtype = torch.bfloat16) -> None:
        key = "reward.models.hps3"
        self.device, self.dtype = own_device(), dtype
        place = folder_or_name(model, key)
        try:
            self.model = load_whole(Qwen2VLRewardModel, place, dtype=dtype).to(self.device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(place, padding_side="right")
            self.processor = AutoImageProcessor.from_pretrained(place)
            self.template = read_template(Path(place) / TEMPLATE)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: {model} cannot be used: {error}") from error
        if dtype == torch.float64:
            self.model.rm_head.double()
        self.model.requires_grad_(False)
        # Since transformers 5 the model wants to be told which tokens are of an image.
        self._wants_types = "mm_token_type_ids" in inspect.signature(self.model.model.forward).parameters
        self._rating = self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    @torch.no_grad()
    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        scores = []
        for first in range(0, len(prompts), _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            patches, grid = self._exact(images[rows])
            scores.append(self._score(patches, grid, [prompt.text for prompt in prompts[rows]]))
        return torch.cat(scores).double().cpu().numpy()

    def differentiable(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The same reward, [B], with a gradient with respect to images [B, 3, H, W] in [0, 1]."""
        levels = (images.detach().float().clamp(0, 1) * 255).round().byte()
        exact, grid = self._exact(levels.permute(0, 2, 3, 1).cpu().numpy())
        smooth = self._smooth(images, *grid[0, 1:].tolist())
        return self._score(smooth + (exact.to(smooth) - smooth).detach(), grid, texts)

    def _exact(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the processor makes of images [B, H, W, 3] uint8: patches of all [N, P], and their grids [B, 3]."""
        check_size(images.shape[1], images.shape[2], self.processor.patch_size * self.processor.merge_size)
        made = self.processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        return made["pixel_values"], made["image_grid_thw"]

    def _smooth(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """The same patches without rounding to bytes, from images [B, 3, H, W] in [0, 1]."""
        processor = self.processor
        patch, merge, times = processor.patch_size, processor.merge_size, processor.temporal_patch_size
        images = wide(images).clamp(0, 1)
        size = rows * patch, columns * patch
        resized = functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v).to(resized).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
        parts = ((resized - mean) / std).unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
        # [B, 3, y, my, py, x, mx, px] -> [B, y, x, my, mx, 3, t, py, px]
        ordered = parts.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*([-1] * 6), times, -1, -1)
        return ordered.reshape(-1, 3 * times * patch * patch)

    def _score(self, patches: Tensor, grid: Tensor, texts: Sequence[str]) -> Tensor:
        tokens = grid[0].prod().item() // self.processor.merge_size**2
        asked = [self.template.replace(PLACE_OF_PROMPT, text.replace(REWARD_TOKEN, "")) for text in texts]
        content = [[{"type": "image"}, {"type": "text", "text": text}] for text in asked]
        chats = [[{"role": "user", "content": parts}] for parts in content]
        written = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        image = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        # The template's own token for the image, which comes first, once for each group of patches.
        written = [text.replace(image, image * tokens, 1) for text in written]
        inputs = self.tokenizer(written, padding=True, return_tensors="pt").to(self.device)
        ids = inputs["input_ids"]
        told: dict[str, Any] = {}
        if self._wants_types:
            told["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        hidden = self.model.model(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            pixel_values=patches.to(self.device, self.dtype),
            image_grid_thw=grid.to(self.device),
            use_cache=False,
            **told,
        ).last_hidden_state
        return self.model.rm_head(wide(hidden[ids == self._rating]))[:, 0]


def read_template(path: Path) -> str:
    """What the model is asked, with the place of the prompt and one rating token.

    Raises:
        ValueError: a template without them.
    """
    text = path.read_text(encoding="utf-8")
    if PLACE_OF_PROMPT not in text or text.count(REWARD_TOKEN) != 1:
        raise ValueError(f"{path}: expected a template with {PLACE_OF_PROMPT} and one {REWARD_TOKEN}")
    return text
