"""Stable Diffusion 1, 2 and XL: a U-Net that predicts noise, texts of CLIP alone, two-pass guidance, DDIM steps."""

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
from star_trainer.families.family import Shapes, TextAxis
from star_trainer.families.noising import DIFFUSION
from star_trainer.families.pipelines.base import DiffusersFamily
from star_trainer.families.pipelines.latents import check_resolution, latent_size
from star_trainer.families.pipelines.shapes import AUTOENCODER_4, CLIP_BIG_G, CLIP_L

_SD1: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD1_PARTS = {"unet": _SD1, "vae": AUTOENCODER_4 | {"scaling_factor": 0.18215}, "text_encoder": CLIP_L}


class StableDiffusion(DiffusersFamily):
    """`Family` of diffusers' StableDiffusionPipeline; its methods are described there."""

    pipeline_class = "StableDiffusionPipeline"
    model_name = "UNet2DConditionModel"
    encoders: Mapping[str, str] = {"text_encoder": "CLIPTextModel"}
    # What looks at images, or judges them.
    unused: Mapping[str, Any] = {
        **dict.fromkeys(("feature_extractor", "image_encoder", "safety_checker")),
        "requires_safety_checker": False,
    }
    published: Mapping[str, Shapes] = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD1_PARTS,
        "CompVis/stable-diffusion-v1-4": _SD1_PARTS,
    }
    model_part = "unet"
    noising = DIFFUSION
    # Of self-attention and cross-attention, as ddpo-pytorch trains them.
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    tokenizers: tuple[str, ...] = ("tokenizer",)

    def accept(self, pipeline: Any, source: str) -> None:
        shape = pipeline.unet.config
        if shape.time_cond_proj_dim is not None:
            raise ValueError(
                "expected a U-Net without time_cond_proj_dim, which reads its guidance scale from an input"
            )
        if shape.in_channels != pipeline.vae.config.latent_channels:
            raise ValueError(
                f"expected a U-Net of the autoencoder's {pipeline.vae.config.latent_channels} channels, "
                f"got one of {shape.in_channels}"
            )
        pipeline.scheduler = ddim(pipeline.scheduler)

    def random_pipeline(self, shapes: Shapes, tokenizer: Path) -> Any:
        from diffusers import DDIMScheduler
        from transformers import AutoTokenizer

        tokens = self._clip_positions(shapes)

        def encode_prompt(pipeline: Any, prompt: str, **_: Any) -> tuple[Tensor | None, ...]:
            """Embeddings [1, N_text, D] and [1, P] on the CPU, the same for the same text."""
            shape, generator = pipeline.unet.config, torch.Generator().manual_seed(len(prompt))
            hidden = torch.randn(1, tokens, shape.cross_attention_dim, generator=generator).to(pipeline.unet.dtype)
            width = (shape.projection_class_embeddings_input_dim or 0) - 6 * (shape.addition_time_embed_dim or 0)
            pooled = torch.randn(1, width, generator=generator).to(pipeline.unet.dtype)
            return hidden, None, pooled, None

        unet, vae = self.build_models(shapes)
        clip = AutoTokenizer.from_pretrained(str(tokenizer), model_max_length=tokens)
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        parts = {"unet": unet, "vae": vae, "scheduler": scheduler, **dict.fromkeys(self.tokenizers, clip)}
        parts |= dict.fromkeys(self.encoder_parts) | dict(self.unused)
        # Of the same name, by which the family is found.
        kind = type(self.pipeline_class, (self.pipeline,), {"encode_prompt": encode_prompt})
        return kind(**parts)

    def check(self, config: Model, shape: Any, vae_scale: int) -> None:
        # Each stage but the last halves the sides.
        check_resolution(config, vae_scale * 2 ** (len(shape.block_out_channels) - 1))

    def num_layers(self, shape: Any) -> int:
        return sum(layers for _, layers in _stages(shape))

    def attention_heads(self, shape: Any) -> tuple[int, int]:
        # Of the finest layers. What diffusers calls the dimension of heads is their number in these models.
        finest, heads = _finest(shape), shape.get("num_attention_heads") or shape.attention_head_dim
        heads = heads if isinstance(heads, int) else heads[finest]
        return heads, shape.block_out_channels[finest] // heads

    def latent_shape(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int, int]:
        return shape.in_channels, *latent_size(config, shape.sample_size, vae_scale)

    def grid(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int]:
        _, height, width = self.latent_shape(config, shape, vae_scale)
        return height // 2 ** _finest(shape), width // 2 ** _finest(shape)

    def num_text_tokens(self, config: Model, shapes: Shapes) -> int:
        return self._clip_positions(shapes)

    def _clip_positions(self, shapes: Shapes) -> int:
        return int(shapes[self.encoder_parts[0]].max_position_embeddings)

    def blocks(self, model: Any) -> Sequence[Any]:
        return [*model.down_blocks, model.mid_block, *model.up_blocks]

    def schedule(
        self, pipeline: Any, config: Model, steps: int, grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        return ddim_schedule(pipeline.scheduler, steps, device, even=config.levels == "even")

    def timesteps_at(self, pipeline: Any, levels: Tensor) -> Tensor:
        """Between two timesteps where no ᾱ is the level."""
        known = pipeline.scheduler.alphas_cumprod.to(levels)
        after = torch.searchsorted(-known, -levels).clamp(1, len(known) - 1)
        high, low = known[after - 1], known[after]
        return (after - (levels - low) / (high - low)).clamp(0, len(known) - 1)

    def encode(self, pipeline: Any, config: Model, text: str, device: torch.device) -> Conditioning:
        hidden, _ = pipeline.encode_prompt(
            prompt=text, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[:2]
        return Conditioning({"text": hidden})

    def text_axis(self, source: str, max_sequence_length: int) -> TextAxis:
        from transformers import AutoTokenizer

        clip = tuple(AutoTokenizer.from_pretrained(source, subfolder=folder) for folder in self.tokenizers)
        length = int(clip[0].model_max_length)
        return TextAxis((clip,), (length,), f"{length} tokens of CLIP")

    def velocity(self, model: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        noise: Tensor = model(
            latents,
            timestep.expand(len(latents)),
            encoder_hidden_states=conditioning.tensors["text"],
            added_cond_kwargs=self._added(conditioning),
            return_dict=False,
        )[0]
        return noise

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """What the U-Net is told beside the text tokens."""
        return None


class StableDiffusionXL(StableDiffusion):
    """`Family` of diffusers' StableDiffusionXLPipeline: two encoders side by side, a pooled vector, and sizes."""

    pipeline_class = "StableDiffusionXLPipeline"
    published: Mapping[str, Shapes] = {
        "stabilityai/stable-diffusion-xl-base-1.0": {
            "unet": _SDXL,
            "vae": AUTOENCODER_4 | {"scaling_factor": 0.13025},
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_BIG_G,
        }
    }
    encoders = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    unused = dict.fromkeys(("feature_extractor", "image_encoder"))
    tokenizers = ("tokenizer", "tokenizer_2")

    def accept(self, pipeline: Any, source: str) -> None:
        super().accept(pipeline, source)
        if pipeline.config.get("requires_aesthetics_score"):
            raise ValueError("expected a base pipeline, got a refiner, which starts from images (aesthetics scores)")

    def encode(self, pipeline: Any, config: Model, text: str, device: torch.device) -> Conditioning:
        hidden, _, pooled, _ = pipeline.encode_prompt(
            prompt=text, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not text and pipeline.config.force_zeros_for_empty_prompt:
            hidden, pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
        scale = int(pipeline.vae_scale_factor)
        _, height, width = self.latent_shape(config, pipeline.unet.config, scale)
        size = (height * scale, width * scale)
        # As if an image of this size had not been cropped.
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=hidden.dtype, device=hidden.device)
        return Conditioning({"text": hidden, "pooled": pooled, "sizes": sizes})

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        return {"text_embeds": conditioning.tensors["pooled"], "time_ids": conditioning.tensors["sizes"]}


def ddim(scheduler: Any) -> Any:
    """diffusers' DDIMScheduler with the settings of another scheduler.

    Raises:
        ValueError: settings with which its step is not linear in latents and noise, or that it has no steps for.
    """
    from diffusers import DDIMScheduler

    if "beta_schedule" not in scheduler.config:
        raise ValueError(f"expected a scheduler of noise predictions, as DDIMScheduler, got {type(scheduler).__name__}")
    # Its own default would clip what others, which know no such setting, do not.
    found = DDIMScheduler.from_config(scheduler.config, clip_sample=scheduler.config.get("clip_sample", False))
    wanted = {
        "prediction_type": ("epsilon",),
        "timestep_spacing": ("leading", "trailing"),
        "clip_sample": (False,),
        "thresholding": (False,),
        "rescale_betas_zero_snr": (False,),
    }
    for name, values in wanted.items():
        if (value := found.config[name]) not in values:
            raise ValueError(f"expected a scheduler with {name} {' or '.join(map(str, values))}, got {value}")
    if found.config.timestep_spacing == "leading" and not (found.config.steps_offset or found.config.set_alpha_to_one):
        raise ValueError(
            "expected a scheduler with steps_offset 1 or set_alpha_to_one True, got neither: its last step would "
            "change nothing"
        )
    return found


def ddim_schedule(scheduler: Any, steps: int, device: torch.device, *, even: bool) -> tuple[Tensor, Tensor]:
    """The levels ᾱ [steps + 1] between which a DDIMScheduler steps, and its timesteps [steps].

    Args:
        scheduler: is left as it is.
        even: space them from the last timestep of training down (the spacing ``trailing``), so that few steps begin at
            noise alone and the last one counts, whatever the scheduler's own spacing.
    """
    scheduler = copy.deepcopy(scheduler)
    if even:
        scheduler.register_to_config(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    levels = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])
    return levels.to(device), scheduler.timesteps.to(device)


def _stages(shape: Any) -> list[tuple[int, int]]:
    """Each stage of a U-Net that attends to text: how often its sides were halved, and its cross-attention layers."""
    depth = len(shape.block_out_channels)
    resnets, transformers = (
        [value] * depth if isinstance(value, int) else list(value)
        for value in (shape.layers_per_block, shape.transformer_layers_per_block)
    )
    found = [
        (level, resnets[level] * transformers[level])
        for level, kind in enumerate(shape.down_block_types)
        if "CrossAttn" in kind
    ]
    if shape.mid_block_type == "UNetMidBlock2DCrossAttn":
        found.append((depth - 1, transformers[-1]))
    return found + [
        (level, (resnets[level] + 1) * transformers[level])
        for level, kind in zip(reversed(range(depth)), shape.up_block_types, strict=True)
        if "CrossAttn" in kind
    ]


def _finest(shape: Any) -> int:
    """How often the sides of latents are halved where attention to the text is finest."""
    return min(level for level, _ in _stages(shape))
