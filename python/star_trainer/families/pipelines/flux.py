"""FLUX.1: text tokens first, of T5 alone, a pooled vector of CLIP, packed latents, and guidance as an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_trainer.config import ConfigError, Model
from star_trainer.families.conditioning import Conditioning, Guidance, GuidanceKind, Prediction, VelocityFunction
from star_trainer.families.family import Shapes
from star_trainer.families.pipelines.base import DiffusersFamily
from star_trainer.families.pipelines.latents import check_resolution, latent_size, pack, unpack
from star_trainer.families.pipelines.shapes import AUTOENCODER_16, CLIP_L, T5_XXL

# The side of a token in latent positions, and of the pipeline's own latents.
_PATCH, _OWN_SIZE = 2, 128
# Positions that the pipeline allows.
_LONGEST_TEXT = 512

_DEV: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
_VAE = AUTOENCODER_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
_ENCODERS = {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL}
_PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "black-forest-labs/FLUX.1-dev": {"transformer": _DEV, "vae": _VAE, **_ENCODERS},
    "black-forest-labs/FLUX.1-schnell": {"transformer": _DEV | {"guidance_embeds": False}, "vae": _VAE, **_ENCODERS},
}


class Flux(DiffusersFamily):
    """`Family` of diffusers' FluxPipeline; its methods are described there."""

    pipeline_class = "FluxPipeline"
    model_name = "FluxTransformer2DModel"
    encoders = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
    text_description = "tokens of T5"
    published: Mapping[str, Shapes] = _PUBLISHED
    # Those of Flow-GRPO's training script: the attention of all blocks, and the dual blocks' feed-forward layers.
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def random_pipeline(self, shapes: Shapes, tokenizer: Path) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
        from transformers import AutoTokenizer

        class RandomPipeline(FluxPipeline):
            def encode_prompt(self, prompt: str, *_: Any, max_sequence_length: int, **__: Any) -> tuple[Tensor, ...]:
                """Embeddings [1, N_text, D] and [1, P], and positions [N_text, 3], on the CPU; the same for the same
                text."""
                shape, generator = self.transformer.config, torch.Generator().manual_seed(len(prompt))
                hidden = torch.randn(1, max_sequence_length, shape.joint_attention_dim, generator=generator)
                pooled = torch.randn(1, shape.pooled_projection_dim, generator=generator)
                dtype = self.transformer.dtype
                return hidden.to(dtype), pooled.to(dtype), torch.zeros(max_sequence_length, 3, dtype=dtype)

        transformer, vae = self.build_models(shapes)
        of_text = AutoTokenizer.from_pretrained(str(tokenizer))
        return RandomPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            tokenizer=of_text,
            tokenizer_2=of_text,
            text_encoder=None,
            text_encoder_2=None,
        )

    def check(self, config: Model, shape: Any, vae_scale: int) -> None:
        check_resolution(config, _PATCH * vae_scale)
        if config.max_sequence_length > _LONGEST_TEXT:
            raise ConfigError(
                f"model.max_sequence_length: expected at most {_LONGEST_TEXT} for a FluxPipeline, "
                f"got {config.max_sequence_length}"
            )

    def num_layers(self, shape: Any) -> int:
        return int(shape.num_layers + shape.num_single_layers)

    def guidance_kind(self, shape: Any) -> GuidanceKind | None:
        return "embedded" if shape.guidance_embeds else None

    def latent_shape(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int, int]:
        return shape.in_channels // _PATCH**2, *latent_size(config, _OWN_SIZE, vae_scale)

    def grid(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int]:
        _, height, width = self.latent_shape(config, shape, vae_scale)
        return height // _PATCH, width // _PATCH

    def blocks(self, model: Any) -> Sequence[Any]:
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def encode(self, pipeline: Any, config: Model, text: str, device: torch.device) -> Conditioning:
        hidden, pooled, _ = pipeline.encode_prompt(
            text, None, device=device, max_sequence_length=config.max_sequence_length
        )
        tensors = {"text": hidden, "pooled": pooled}
        if pipeline.transformer.config.guidance_embeds:
            tensors["guidance"] = torch.ones(1)
        return Conditioning(tensors)

    def velocity(self, model: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        text, device = conditioning.tensors["text"], latents.device
        grid = latents.shape[2] // _PATCH, latents.shape[3] // _PATCH
        rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in grid)
        packed: Tensor = model(
            hidden_states=pack(latents, _PATCH),
            # The model multiplies by a thousand again, in its own precision.
            timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=conditioning.tensors.get("guidance"),
            pooled_projections=conditioning.tensors["pooled"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            img_ids=torch.cartesian_prod(torch.zeros(1, device=device), rows, columns),
            return_dict=False,
        )[0]
        return unpack(packed, grid, _PATCH)

    def predict(
        self,
        velocity: VelocityFunction,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        guidance: Guidance | None,
    ) -> Prediction:
        if guidance is not None:
            scales = torch.full_like(conditioning.tensors["guidance"], guidance.scale)
            conditioning = Conditioning({**conditioning.tensors, "guidance": scales})
        return Prediction(velocity(latents, timestep, conditioning))
