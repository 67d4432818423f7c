"""Z-Image: one stream of image, then text, of each prompt's own length; lists of latents; classifier-free guidance."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_trainer.config import Model
from star_trainer.families.conditioning import (
    Conditioning,
)
from star_trainer.families.family import Shapes
from star_trainer.families.pipelines.base import DiffusersFamily
from star_trainer.families.pipelines.flow_schedule import flow_schedule
from star_trainer.families.pipelines.latents import check_resolution, latent_size, padded
from star_trainer.families.pipelines.shapes import AUTOENCODER_16, QWEN_3_4B

# The side of a token in latent positions, and of the pipeline's own latents.
_PATCH, _OWN_SIZE = 2, 128

_SHAPES: dict[str, dict[str, Any]] = {
    # The class's own defaults are the published sizes, but for the length of the axes.
    "transformer": {"axes_lens": [1536, 512, 512]},
    "vae": AUTOENCODER_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": QWEN_3_4B,
}
_TURBO = "Tongyi-MAI/Z-Image-Turbo"
_PUBLISHED = {"Tongyi-MAI/Z-Image": _SHAPES, _TURBO: _SHAPES}


class ZImage(DiffusersFamily):
    """`Family` of diffusers' ZImagePipeline; its methods are described there.

    Scales of guidance are those of docs/method.md, section 2, where 1 is without: the pipeline's own count from 0.
    """

    pipeline_class = "ZImagePipeline"
    model_name = "ZImageTransformer2DModel"
    encoders = {"text_encoder": "Qwen3Model"}
    text_description = "tokens with Z-Image's chat template"
    published: Mapping[str, Shapes] = _PUBLISHED
    # Those of Flow-Factory: attention and feed-forward layers.
    lora_targets = (
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )

    def is_distilled(self, source: str) -> bool:
        # By its name alone: its files are like those of the model that it was made of.
        return source == _TURBO

    def random_pipeline(self, shapes: Shapes, tokenizer: Path) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
        from transformers import AutoTokenizer

        class RandomPipeline(ZImagePipeline):
            def encode_prompt(
                self, prompt: str, *_: Any, max_sequence_length: int, **__: Any
            ) -> tuple[list[Tensor], list[Tensor]]:
                """Embeddings [N_text, D] on the CPU, the same for the same text."""
                shape, generator = self.transformer.config, torch.Generator().manual_seed(len(prompt))
                hidden = torch.randn(max_sequence_length, shape.cap_feat_dim, generator=generator)
                return [hidden.to(self.transformer.dtype)], []

        transformer, vae = self.build_models(shapes)
        of_text = AutoTokenizer.from_pretrained(str(tokenizer))
        of_text.chat_template = "{{ messages[0]['content'] }}"
        return RandomPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            tokenizer=of_text,
            text_encoder=None,
        )

    def check(self, config: Model, shape: Any, vae_scale: int) -> None:
        check_resolution(config, _PATCH * vae_scale)

    def num_layers(self, shape: Any) -> int:
        return int(shape.n_layers)

    def attention_heads(self, shape: Any) -> tuple[int, int]:
        return shape.n_heads, shape.dim // shape.n_heads

    def latent_shape(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int, int]:
        return shape.in_channels, *latent_size(config, _OWN_SIZE, vae_scale)

    def grid(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int]:
        _, height, width = self.latent_shape(config, shape, vae_scale)
        return height // _PATCH, width // _PATCH

    def blocks(self, model: Any) -> Sequence[Any]:
        return [*model.noise_refiner, *model.context_refiner, *model.layers]

    def schedule(
        self, pipeline: Any, config: Model, steps: int, grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        from diffusers.pipelines.z_image import pipeline_z_image

        # The pipeline itself hands even levels to its scheduler, whatever `model.levels`; in older releases it lets
        # that one choose, down to nothing.
        even, scheduler = hasattr(pipeline_z_image, "get_default_z_image_sigmas"), pipeline.scheduler
        if not even:
            scheduler = copy.deepcopy(scheduler)
            scheduler.sigma_min = 0.0
        return flow_schedule(scheduler, steps, grid[0] * grid[1], device, even=even)

    def encode(self, pipeline: Any, config: Model, text: str, device: torch.device) -> Conditioning:
        (hidden,), _ = pipeline.encode_prompt(
            text, device=device, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length
        )
        text_tokens = padded(hidden[None], config.max_sequence_length)
        return Conditioning({"text": text_tokens}, torch.tensor([len(hidden)]))

    def velocity(self, model: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.lengths is not None, "of `encode`"
        rows = zip(conditioning.tensors["text"], conditioning.lengths.tolist(), strict=True)
        # It is told how clean the latents are, and predicts what leads back to them.
        cleanness = (1000 - timestep.expand(len(latents))) / 1000
        frames: list[Tensor] = model(
            list(latents.unsqueeze(2).unbind()), cleanness, [text[:length] for text, length in rows], return_dict=False
        )[0]
        return -torch.stack(frames).squeeze(2)
