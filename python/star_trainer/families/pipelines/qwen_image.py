"""Qwen-Image: text first, behind a template and masked; packed latents; guidance whose result is rescaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_trainer.config import ConfigError, Model
from star_trainer.families.conditioning import (
    Conditioning,
    Guidance,
    Prediction,
    VelocityFunction,
    guided_by_two_predictions,
)
from star_trainer.families.family import Shapes
from star_trainer.families.pipelines.base import DiffusersFamily
from star_trainer.families.pipelines.latents import check_resolution, decoded, latent_size, pack, padded, unpack
from star_trainer.families.pipelines.shapes import QWEN_2_5_VL_7B

# The side of a token in latent positions, and of the pipeline's own latents.
_PATCH, _OWN_SIZE = 2, 128
# Positions that the pipeline allows.
_LONGEST_TEXT = 1024

_QWEN_IMAGE: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}
_SHAPES: dict[str, dict[str, Any]] = {
    "transformer": _QWEN_IMAGE,
    # The class's own defaults are the published autoencoder's.
    "vae": {},
    "text_encoder": QWEN_2_5_VL_7B,
}
_PUBLISHED = {"Qwen/Qwen-Image": _SHAPES, "Qwen/Qwen-Image-2512": _SHAPES}


class QwenImage(DiffusersFamily):
    """`Family` of diffusers' QwenImagePipeline; its methods are described there.

    Every prompt is padded to ``model.max_sequence_length`` and masked, so that no result depends on a batch's longest.
    """

    pipeline_class = "QwenImagePipeline"
    model_name = "QwenImageTransformer2DModel"
    vae_name = "AutoencoderKLQwenImage"
    encoders = {"text_encoder": "Qwen2_5_VLForConditionalGeneration"}
    text_description = "tokens behind Qwen-Image's template"
    published: Mapping[str, Shapes] = _PUBLISHED
    # Those of Flow-Factory and of verl: the attention and the feed-forward layers of both streams.
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )

    def load(self, source: str, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
        from diffusers.models.transformers import transformer_qwenimage

        if not hasattr(transformer_qwenimage, "compute_text_seq_len_from_mask"):
            raise ValueError("expected diffusers 0.37 or newer, whose QwenImageTransformer2DModel masks padded text")
        return super().load(source, dtype, vae_dtype)

    def unread(self, model: Any) -> Sequence[Any]:
        # The text that the last block gives.
        last = model.transformer_blocks[-1]
        return [last.attn.to_add_out, last.txt_mlp]

    def random_pipeline(self, shapes: Shapes, tokenizer: Path) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
        from transformers import AutoTokenizer

        class RandomPipeline(QwenImagePipeline):
            def encode_prompt(self, prompt: str, *_: Any, max_sequence_length: int, **__: Any) -> tuple[Tensor, None]:
                """Embeddings [1, N_text, D] on the CPU, the same for the same text."""
                shape, generator = self.transformer.config, torch.Generator().manual_seed(len(prompt))
                hidden = torch.randn(1, max_sequence_length, shape.joint_attention_dim, generator=generator)
                return hidden.to(self.transformer.dtype), None

        transformer, vae = self.build_models(shapes)
        pipeline = RandomPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            tokenizer=AutoTokenizer.from_pretrained(str(tokenizer)),
            text_encoder=None,
        )
        # The template would take more of a small tokenizer's tokens than are dropped.
        pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = "{}", 0
        return pipeline

    def check(self, config: Model, shape: Any, vae_scale: int) -> None:
        check_resolution(config, _PATCH * vae_scale)
        if config.max_sequence_length > _LONGEST_TEXT:
            raise ConfigError(
                f"model.max_sequence_length: expected at most {_LONGEST_TEXT} for a QwenImagePipeline, "
                f"got {config.max_sequence_length}"
            )

    def latent_shape(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int, int]:
        return shape.in_channels // _PATCH**2, *latent_size(config, _OWN_SIZE, vae_scale)

    def grid(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int]:
        _, height, width = self.latent_shape(config, shape, vae_scale)
        return height // _PATCH, width // _PATCH

    def encode(self, pipeline: Any, config: Model, text: str, device: torch.device) -> Conditioning:
        hidden, _ = pipeline.encode_prompt(text, device=device, max_sequence_length=config.max_sequence_length)
        mask = torch.arange(config.max_sequence_length, device=hidden.device) < hidden.shape[1]
        return Conditioning({"text": padded(hidden, config.max_sequence_length), "mask": mask[None]})

    def velocity(self, model: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        grid = latents.shape[2] // _PATCH, latents.shape[3] // _PATCH
        packed: Tensor = model(
            hidden_states=pack(latents, _PATCH),
            # The model multiplies by a thousand again, in its own precision.
            timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
            encoder_hidden_states=conditioning.tensors["text"],
            encoder_hidden_states_mask=conditioning.tensors["mask"],
            img_shapes=[[(1, *grid)]] * len(latents),
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
        both = guided_by_two_predictions(velocity, latents, timestep, conditioning, guidance)
        if both.unconditional is None:
            return both
        # Each token of the guided velocity gets the length that the conditional one has there.
        guided, grid = both.guided, (latents.shape[2] // _PATCH, latents.shape[3] // _PATCH)
        norms = [pack(each, _PATCH).norm(dim=-1, keepdim=True) for each in (both.velocity, guided)]
        ratio = (norms[0] / norms[1]).expand(-1, -1, _PATCH**2)
        return Prediction(guided * unpack(ratio, grid, _PATCH))

    def pixels(self, pipeline: Any, latents: Tensor, decoder: Any) -> Tensor:
        if decoder is not None:
            return decoded(decoder, latents)
        vae = pipeline.vae
        mean, std = (
            torch.tensor(vae.config[name], device=latents.device, dtype=vae.dtype).view(1, -1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        # An autoencoder of videos, of one frame here.
        frames = (latents.to(vae.dtype) * std + mean).unsqueeze(2)
        return (vae.decode(frames, return_dict=False)[0][:, :, 0].float() / 2 + 0.5).clamp(0, 1)
