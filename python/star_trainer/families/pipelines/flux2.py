"""FLUX.2 klein: text tokens first, of Qwen3 behind its chat template, and latents normed by batch statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from star_trainer.config import Model
from star_trainer.families.conditioning import (
    Conditioning,
)
from star_trainer.families.family import Shapes
from star_trainer.families.pipelines.base import DiffusersFamily
from star_trainer.families.pipelines.flow_schedule import flow_schedule
from star_trainer.families.pipelines.latents import check_resolution, latent_size, pack, unpack
from star_trainer.families.pipelines.shapes import QWEN_3_4B

# The side of a token in positions of the autoencoder's latents, of which the pipeline's own have that many.
_PATCH, _OWN_SIZE = 2, 128

_KLEIN_4B: dict[str, Any] = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_KLEIN_9B = _KLEIN_4B | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
_QWEN3_8B = QWEN_3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
# The autoencoder is that of AutoencoderKLFlux2's own defaults.
_SIZES = {"4B": (_KLEIN_4B, QWEN_3_4B), "9B": (_KLEIN_9B, _QWEN3_8B)}
_PUBLISHED: dict[str, dict[str, Any]] = {
    f"black-forest-labs/FLUX.2-klein-{prefix}{size}": {
        "transformer": transformer,
        "vae": {},
        "text_encoder": encoder,
    }
    for prefix in ("base-", "")
    for size, (transformer, encoder) in _SIZES.items()
}


class Flux2Klein(DiffusersFamily):
    """`Family` of diffusers' Flux2KleinPipeline; its methods are described there.

    A latent [C, H, W] is what the model sees: a position is a token, with the channels of four of the autoencoder's.
    """

    pipeline_class = "Flux2KleinPipeline"
    model_name = "Flux2Transformer2DModel"
    vae_name = "AutoencoderKLFlux2"
    encoders = {"text_encoder": "Qwen3ForCausalLM"}
    text_description = "tokens of Qwen3, its chat template included"
    published: Mapping[str, Shapes] = _PUBLISHED
    # Those that Flow-Factory trains by default.
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    )

    def is_distilled(self, source: str) -> bool:
        if source in self.published and not Path(source).is_dir():
            return "-base-" not in source
        return bool(self.pipeline.load_config(source).get("is_distilled"))

    def random_pipeline(self, shapes: Shapes, tokenizer: Path) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler
        from transformers import AutoTokenizer

        class RandomPipeline(self.pipeline):  # type: ignore[name-defined]
            def encode_prompt(self, prompt: str, *_: Any, max_sequence_length: int, **__: Any) -> tuple[Tensor, ...]:
                """Embeddings [1, N_text, D] and positions [1, N_text, 4] on the CPU, the same for the same text."""
                generator = torch.Generator().manual_seed(len(prompt))
                width = self.transformer.config.joint_attention_dim
                hidden = torch.randn(1, max_sequence_length, width, generator=generator)
                return hidden.to(self.transformer.dtype), self._prepare_text_ids(hidden)

        transformer, vae = self.build_models(shapes)
        of_text = AutoTokenizer.from_pretrained(str(tokenizer))
        of_text.chat_template = "{{ messages[0].content }}"
        return RandomPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            tokenizer=of_text,
            text_encoder=None,
            is_distilled=shapes["is_distilled"],
        )

    def check(self, config: Model, shape: Any, vae_scale: int) -> None:
        check_resolution(config, _PATCH * vae_scale)

    def num_layers(self, shape: Any) -> int:
        return int(shape.num_layers + shape.num_single_layers)

    def latent_shape(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int, int]:
        return shape.in_channels, *latent_size(config, _OWN_SIZE // _PATCH, _PATCH * vae_scale)

    def grid(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int]:
        _, height, width = self.latent_shape(config, shape, vae_scale)
        return height, width

    def blocks(self, model: Any) -> Sequence[Any]:
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def schedule(
        self, pipeline: Any, config: Model, steps: int, grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        tokens = grid[0] * grid[1]
        # The pipeline itself hands even levels to its scheduler, whatever `model.levels`.
        return flow_schedule(
            pipeline.scheduler, steps, tokens, device, even=True, shift=compute_empirical_mu(tokens, steps)
        )

    def encode(self, pipeline: Any, config: Model, text: str, device: torch.device) -> Conditioning:
        hidden, _ = pipeline.encode_prompt(text, device=device, max_sequence_length=config.max_sequence_length)
        return Conditioning({"text": hidden})

    def velocity(self, model: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        text, device = conditioning.tensors["text"], latents.device
        grid = latents.shape[2], latents.shape[3]
        # Positions in time, row, column and text.
        rows, columns, words = (torch.arange(count, device=device) for count in (*grid, text.shape[1]))
        zero = torch.zeros(1, device=device, dtype=torch.int64)
        packed: Tensor = model(
            hidden_states=pack(latents, 1),
            # The model multiplies by a thousand again, in its own precision.
            timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=torch.cartesian_prod(zero, zero, zero, words),
            img_ids=torch.cartesian_prod(zero, rows, columns, zero),
            return_dict=False,
        )[0]
        return unpack(packed, grid, 1)

    def pixels(self, pipeline: Any, latents: Tensor, decoder: Any) -> Tensor:
        norm, epsilon = pipeline.vae.bn, pipeline.vae.config.batch_norm_eps
        mean, variance = (value.to(latents.dtype).view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
        unscaled = pixel_shuffle(latents * torch.sqrt(variance + epsilon) + mean, _PATCH)
        vae = pipeline.vae if decoder is None else decoder
        return (vae.decode(unscaled.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
