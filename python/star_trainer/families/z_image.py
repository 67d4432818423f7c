"""Z-Image: one stream of image, then text, of each prompt's own length; lists of latents; classifier-free guidance."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import star_kernels as sk
from star_kernels.text_units import text_axis_of
from star_trainer.config import Model
from star_trainer.families.conditioning import (
    Conditioning,
    Guidance,
    GuidanceKind,
    Prediction,
    VelocityFunction,
    guided_by_two_predictions,
)
from star_trainer.families.family import Shapes, TextAxis
from star_trainer.families.flow_schedule import check_euler, flow_schedule
from star_trainer.families.latents import check_resolution, decoded, latent_size, padded
from star_trainer.families.loading import load_parts, part_shapes, read_lora, save_lora
from star_trainer.families.noising import FLOW
from star_trainer.families.shapes import AUTOENCODER_16, QWEN_3_4B

# The side of a token in latent positions, and of the pipeline's own latents.
_PATCH, _OWN_SIZE = 2, 128

_SHAPES: dict[str, dict[str, Any]] = {
    # The class's own defaults are the published sizes, but for the length of the axes.
    "transformer": {"axes_lens": [1536, 512, 512]},
    "vae": AUTOENCODER_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": QWEN_3_4B,
}
_PUBLISHED = {"Tongyi-MAI/Z-Image": _SHAPES, "Tongyi-MAI/Z-Image-Turbo": _SHAPES}


class ZImage:
    """`Family` of diffusers' ZImagePipeline; its methods are described there.

    Scales of guidance are those of docs/method.md, section 2, where 1 is without: the pipeline's own count from 0.
    """

    pipeline_class = "ZImagePipeline"
    published: Mapping[str, Shapes] = _PUBLISHED
    model_part = "transformer"
    noising = FLOW
    encoder_parts = ("text_encoder",)
    # Those of Flow-Factory: attention and feed-forward layers.
    lora_targets = (
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )

    @property
    def model_class(self) -> Any:
        from diffusers import ZImageTransformer2DModel

        return ZImageTransformer2DModel

    def load(self, source: str, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
        from diffusers import AutoencoderKL, ZImagePipeline
        from transformers import Qwen3Model

        kinds = {"transformer": self.model_class, "vae": AutoencoderKL, "text_encoder": Qwen3Model}
        parts = load_parts(kinds, source, dtype, vae_dtype)
        pipeline = ZImagePipeline.from_pretrained(source, **parts, torch_dtype=dtype, use_safetensors=True)
        check_euler(pipeline.scheduler)
        return pipeline

    def shapes(self, source: str) -> Shapes:
        from diffusers import AutoencoderKL
        from transformers import Qwen3Config

        models = {"transformer": self.model_class, "vae": AutoencoderKL}
        return part_shapes(source, self.published, models, {"text_encoder": Qwen3Config})

    def build_models(self, shapes: Shapes) -> tuple[Any, Any]:
        from diffusers import AutoencoderKL

        return self.model_class.from_config(shapes["transformer"]), AutoencoderKL.from_config(shapes["vae"])

    def build_encoders(self, shapes: Shapes) -> list[Any]:
        from transformers import Qwen3Model

        return [Qwen3Model(shapes["text_encoder"])]

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

    def guidance_kind(self, shape: Any) -> GuidanceKind | None:
        return "two_predictions"

    def attention_heads(self, shape: Any) -> tuple[int, int]:
        return shape.n_heads, shape.dim // shape.n_heads

    def latent_shape(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int, int]:
        return shape.in_channels, *latent_size(config, _OWN_SIZE, vae_scale)

    def grid(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int]:
        _, height, width = self.latent_shape(config, shape, vae_scale)
        return height // _PATCH, width // _PATCH

    def num_text_tokens(self, config: Model, shapes: Shapes) -> int:
        return config.max_sequence_length

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

    def timesteps_at(self, pipeline: Any, levels: Tensor) -> Tensor:
        return levels * pipeline.scheduler.config.num_train_timesteps

    def encode(self, pipeline: Any, config: Model, text: str, device: torch.device) -> Conditioning:
        (hidden,), _ = pipeline.encode_prompt(
            text, device=device, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length
        )
        text_tokens = padded(hidden[None], config.max_sequence_length)
        return Conditioning({"text": text_tokens}, torch.tensor([len(hidden)]))

    def text_units(
        self, pipeline: Any, config: Model, texts: Sequence[str], units: Sequence[Sequence[str]]
    ) -> sk.TextUnits:
        return sk.TextUnits.from_prompts(texts, units, **text_axis_of(pipeline, config.max_sequence_length))

    def text_axis(self, source: str, max_sequence_length: int) -> TextAxis:
        from diffusers import ZImagePipeline

        others = dict.fromkeys(("transformer", "vae", "text_encoder", "scheduler"))
        axis = text_axis_of(ZImagePipeline.from_pretrained(source, **others), max_sequence_length)
        return TextAxis(**axis, description=f"{max_sequence_length} tokens with Z-Image's chat template")

    def velocity(self, model: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.lengths is not None, "of `encode`"
        rows = zip(conditioning.tensors["text"], conditioning.lengths.tolist(), strict=True)
        # It is told how clean the latents are, and predicts what leads back to them.
        cleanness = (1000 - timestep.expand(len(latents))) / 1000
        frames: list[Tensor] = model(
            list(latents.unsqueeze(2).unbind()), cleanness, [text[:length] for text, length in rows], return_dict=False
        )[0]
        return -torch.stack(frames).squeeze(2)

    def predict(
        self,
        velocity: VelocityFunction,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        guidance: Guidance | None,
    ) -> Prediction:
        return guided_by_two_predictions(velocity, latents, timestep, conditioning, guidance)

    def pixels(self, pipeline: Any, latents: Tensor, decoder: Any) -> Tensor:
        return decoded(pipeline.vae if decoder is None else decoder, latents)

    def save_adapter(self, folder: Path, layers: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        from diffusers import ZImagePipeline

        save_lora(ZImagePipeline, folder, layers, metadata)

    def read_adapter(self, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from diffusers import ZImagePipeline

        return read_lora(ZImagePipeline, source)
