"""Stable Diffusion 3 and 3.5: image tokens first, two CLIP encoders and a T5, a pooled vector, two-pass guidance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_trainer.config import Model
from star_trainer.families.conditioning import (
    Conditioning,
)
from star_trainer.families.family import Shapes, TextAxis
from star_trainer.families.pipelines.base import DiffusersFamily
from star_trainer.families.pipelines.flow_schedule import flow_schedule
from star_trainer.families.pipelines.latents import check_resolution, latent_size
from star_trainer.families.pipelines.shapes import AUTOENCODER_16, CLIP_BIG_G, CLIP_L, T5_XXL

_SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}

_SD35_LARGE = _SD35_MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
_SD3_MEDIUM = _SD35_MEDIUM | {"pos_embed_max_size": 192, "dual_attention_layers": [], "qk_norm": None}
_TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_BIG_G,
    "text_encoder_3": T5_XXL,
}

# The shapes of published pipelines, by name on the model hub and part, for machines without their files or a network.
_PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": {
        "transformer": _SD3_MEDIUM,
        "vae": AUTOENCODER_16,
        **_TEXT_ENCODERS,
    },
    "stabilityai/stable-diffusion-3.5-medium": {
        "transformer": _SD35_MEDIUM,
        "vae": AUTOENCODER_16,
        **_TEXT_ENCODERS,
    },
    "stabilityai/stable-diffusion-3.5-large": {
        "transformer": _SD35_LARGE,
        "vae": AUTOENCODER_16,
        **_TEXT_ENCODERS,
    },
}


class StableDiffusion3(DiffusersFamily):
    """`Family` of diffusers' StableDiffusion3Pipeline; its methods are described there."""

    pipeline_class = "StableDiffusion3Pipeline"
    model_name = "SD3Transformer2DModel"
    encoders = {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }
    optional = (*encoders, "tokenizer", "tokenizer_2", "tokenizer_3")
    published: Mapping[str, Shapes] = _PUBLISHED
    # Of the joint attention alone: the image-only attention of dual blocks is attn2.
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def random_pipeline(self, shapes: Shapes, tokenizer: Path) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
        from transformers import AutoTokenizer

        class RandomPipeline(StableDiffusion3Pipeline):
            def encode_prompt(self, prompt: str, *_: Any, max_sequence_length: int, **__: Any) -> tuple[Tensor, ...]:
                """Embeddings [1, N_text, D] and [1, P] on the CPU, the same for the same text."""
                shape, generator = self.transformer.config, torch.Generator().manual_seed(len(prompt))
                tokens = self.tokenizer_max_length + max_sequence_length
                hidden = torch.randn(1, tokens, shape.joint_attention_dim, generator=generator)
                pooled = torch.randn(1, shape.pooled_projection_dim, generator=generator)
                hidden, pooled = hidden.to(self.transformer.dtype), pooled.to(self.transformer.dtype)
                return hidden, hidden, pooled, pooled

        transformer, vae = self.build_models(shapes)
        clip = AutoTokenizer.from_pretrained(str(tokenizer), model_max_length=self._clip_positions(shapes))
        return RandomPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            tokenizer=clip,
            tokenizer_2=clip,
            tokenizer_3=None,
            text_encoder=None,
            text_encoder_2=None,
            text_encoder_3=None,
        )

    def check(self, config: Model, shape: Any, vae_scale: int) -> None:
        token = vae_scale * shape.patch_size
        check_resolution(config, token, largest=token * shape.pos_embed_max_size)

    def latent_shape(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int, int]:
        return shape.in_channels, *latent_size(config, shape.sample_size, vae_scale)

    def grid(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int]:
        _, height, width = self.latent_shape(config, shape, vae_scale)
        return height // shape.patch_size, width // shape.patch_size

    def num_text_tokens(self, config: Model, shapes: Shapes) -> int:
        return self._clip_positions(shapes) + config.max_sequence_length

    @staticmethod
    def _clip_positions(shapes: Shapes) -> int:
        found = (shapes[part].max_position_embeddings for part in ("text_encoder", "text_encoder_2") if part in shapes)
        # Without either the pipeline leaves as many positions empty.
        return int(next(found, 77))

    def schedule(
        self, pipeline: Any, config: Model, steps: int, grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        return flow_schedule(pipeline.scheduler, steps, grid[0] * grid[1], device, even=config.levels == "even")

    def encode(self, pipeline: Any, config: Model, text: str, device: torch.device) -> Conditioning:
        hidden, _, pooled, _ = pipeline.encode_prompt(
            text,
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=config.max_sequence_length,
        )
        return Conditioning({"text": hidden, "pooled": pooled})

    def text_axis(self, source: str, max_sequence_length: int) -> TextAxis:
        from transformers import AutoTokenizer

        folders = ("tokenizer", "tokenizer_2", "tokenizer_3")
        clip, clip_2, t5 = (AutoTokenizer.from_pretrained(source, subfolder=folder) for folder in folders)
        lengths = (clip.model_max_length, max_sequence_length)
        return TextAxis(((clip, clip_2), t5), lengths, f"{lengths[0]} tokens of CLIP and {lengths[1]} of T5")

    def velocity(self, model: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        velocity: Tensor = model(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=conditioning.tensors["text"],
            pooled_projections=conditioning.tensors["pooled"],
            return_dict=False,
        )[0]
        return velocity
