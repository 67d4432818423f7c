"""ImageReward (arXiv 2304.05977): BLIP reads the prompt while it looks at the image, and a head rates what it read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, BlipConfig, BlipTextModel, BlipVisionModel
from transformers.models.blip.modeling_blip import BlipPreTrainedModel

from star_trainer.config import ConfigError
from star_trainer.config.paths import folder_or_name
from star_trainer.families.devices import own_device
from star_trainer.families.loading import load_whole
from star_trainer.prompts import Prompt
from star_trainer.rewards.models.clip import AT_ONCE
from star_trainer.rewards.models.heads import linear_head
from star_trainer.rewards.models.preparation import Preparation, check_size, wide

# Of the scores on the authors' own data, by which the published code makes them of mean 0 and deviation 1.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
_LONGEST = 35  # tokens


class ImageRewardModel(BlipPreTrainedModel):
    """BLIP's image encoder, its text encoder with cross-attention to the image, and the head."""

    config_class = BlipConfig

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.mlp = linear_head(config.text_config.hidden_size)
        self.post_init()


class ImageReward:
    """How well people would like an image for its prompt: mean 0 and deviation 1 over the authors' images.

    Called with images [B, H, W, 3] uint8 and their prompts; returns [B] float64.

    Args:
        model: a folder that `star-convert-reward` has written.
        dtype: of BLIP's weights; the head's are in float32 at least.

    Raises:
        ConfigError: it cannot be loaded whole.
    """

    def __init__(self, model: str, *, dtype: torch.dtype = torch.float32) -> None:
        key = "reward.models.image_reward"
        self.device, self.dtype = own_device(), dtype
        place = folder_or_name(model, key)
        try:
            self.model = load_whole(ImageRewardModel, place).float().to(self.device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(place)
            self.preparation = Preparation(AutoImageProcessor.from_pretrained(place))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: {model} cannot be used: {error}") from error
        for part in (self.model.vision_model, self.model.text_encoder):
            part.to(dtype)
        if dtype == torch.float64:
            self.model.mlp.double()
        self.model.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        check_size(*images.shape[1:3])
        scores = []
        for first in range(0, len(prompts), AT_ONCE):
            rows = slice(first, first + AT_ONCE)
            texts = [prompt.text for prompt in prompts[rows]]
            scores.append(self._score(self.preparation.of_bytes(images[rows]), texts))
        return torch.cat(scores).double().cpu().numpy()

    def differentiable(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The same reward, [B], with a gradient with respect to images [B, 3, H, W] in [0, 1]."""
        return self._score(self.preparation(images.to(self.device)), texts)

    def _score(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt"
        ).to(self.device)
        seen = self.model.vision_model(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        read = self.model.text_encoder(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state
        return (self.model.mlp(wide(read[:, 0])).squeeze(1) - MEAN) / STD
