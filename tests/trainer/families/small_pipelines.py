"""A random small pipeline of each family, of the real classes, and how diffusers' own pipeline samples from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.tiny_models import tiny_clip_tokenizer, tiny_qwen_tokenizer, tiny_t5_tokenizer, tiny_transformer

# The usual model.max_sequence_length.
LENGTH = 24


@dataclass(frozen=True)
class SmallPipeline:
    """A row of `test_families.py`.

    Attributes:
        build: the pipeline, of random weights; what it encodes and decodes depends on all of them.
        resolutions: two of (height, width), neither a square, and one that is no multiple of the step.
        length: model.max_sequence_length.
        guidance_scale: one that the model takes, or 1 for a model without guidance.
        packed: how the pipeline wants latents [1, C, H, W] that it is handed.
        unpacked: latents [1, C, H, W] of what it gives for ``output_type="latent"``, and the trainer's latent shape.
        prepared: the pipeline as it samples what the trainer trains.
        options: what its call wants beside what all take.
        settings: what training it wants beside what all take.
        r0: whether rewards can be back-propagated through it.
        guided: what its call wants for a guidance scale, as the trainer means it.
    """

    build: Callable[[], Any]
    resolutions: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    length: int = LENGTH
    guidance_scale: float = 1.0
    packed: Callable[[Tensor], Tensor] = lambda latents: latents
    unpacked: Callable[[Tensor, tuple[int, int, int]], Tensor] = lambda latents, shape: latents
    prepared: Callable[[Any], Any] = lambda pipeline: pipeline
    options: dict[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    r0: bool = True
    guided: Callable[[float], dict[str, Any]] = lambda scale: {"guidance_scale": scale}

    def save(self, folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.build().save_pretrained(folder)

    def sample(
        self, pipeline: Any, prompt: str, noise: Tensor, size: tuple[int, int], steps: int, guidance_scale: float
    ) -> Tensor:
        """Latents [1, C, H, W] by diffusers' own pipeline from `noise` of that shape."""
        result = self._call(pipeline, prompt, noise, size, steps, guidance_scale, "latent")
        return self.unpacked(result, tuple(noise.shape[1:]))  # type: ignore[arg-type]

    def draw(
        self, pipeline: Any, prompt: str, noise: Tensor, size: tuple[int, int], steps: int, guidance_scale: float
    ) -> Any:
        """An image [H, W, 3] in [0, 1], likewise."""
        return self._call(pipeline, prompt, noise, size, steps, guidance_scale, "np")[0]

    def _call(
        self,
        pipeline: Any,
        prompt: str,
        noise: Tensor,
        size: tuple[int, int],
        steps: int,
        guidance_scale: float,
        output_type: str,
    ) -> Any:
        options = {"height": size[0], "width": size[1], "num_inference_steps": steps, **self.options}
        options |= {**self.guided(guidance_scale), "output_type": output_type}
        return self.prepared(pipeline)(prompt=prompt, latents=self.packed(noise), **options).images


def autoencoder(blocks: int = 3, **config: Any) -> AutoencoderKL:
    """One with `blocks` - 1 halvings of the sides, and latents of four channels."""
    return AutoencoderKL(
        **{
            "block_out_channels": (8,) * blocks,
            "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks,
            "norm_num_groups": 2,
            "latent_channels": 4,
            "scaling_factor": 1.5,
            "shift_factor": 0.1,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            **config,
        }
    )


def clip_config(tokenizer: Any, width: int) -> CLIPTextConfig:
    """A text encoder of two layers; the pooled vector is read where the tokenizer's end token stands."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def t5_encoder(tokenizer: Any, width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_ff=2 * width,
        d_kv=8,
        num_heads=2,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config)


def packed(latents: Tensor) -> Tensor:
    """[1, C, H, W] as FLUX.1's pipeline, and those after it, pack them."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpacked(tokens: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """And back."""
    return FluxPipeline._unpack_latents(tokens, shape[1], shape[2], 1)


def stable_diffusion_3() -> Any:
    clip, t5 = tiny_clip_tokenizer(model_max_length=20), tiny_t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=tiny_transformer(joint_attention_dim=24, pooled_projection_dim=20, num_layers=2, sample_size=16),
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=clip,
        tokenizer_2=clip,
        tokenizer_3=t5,
        text_encoder=CLIPTextModelWithProjection(clip_config(clip, 8)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(clip, 12)),
        text_encoder_3=t5_encoder(t5, 24),
    )


def flux(**config: Any) -> Any:
    clip, t5 = tiny_clip_tokenizer(model_max_length=20), tiny_t5_tokenizer()
    sizes = {"in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6)}
    blocks = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**{**sizes, **blocks, "guidance_embeds": True, **config}),
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_image_seq_len=300),
        tokenizer=clip,
        tokenizer_2=t5,
        text_encoder=CLIPTextModel(clip_config(clip, 20)),
        text_encoder_2=t5_encoder(t5, 24),
    )


# Of the schedulers that Stable Diffusion is published with, which do not read all of it.
NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def unet(**config: Any) -> UNet2DConditionModel:
    """Of Stable Diffusion's kind: attention to the text at the resolution of latents, and at half of it."""
    return UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": 20,
            **config,
        }
    )


def stable_diffusion() -> Any:
    """With the scheduler that Stable Diffusion 1.5 is published with, which is not the one that it is trained with."""
    clip = tiny_clip_tokenizer(model_max_length=20)
    return StableDiffusionPipeline(
        unet=unet(),
        vae=autoencoder(shift_factor=None),
        scheduler=PNDMScheduler.from_config(NOISE),
        tokenizer=clip,
        text_encoder=CLIPTextModel(clip_config(clip, 20)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    """Whose latents are halved before they attend to the text."""
    clip = tiny_clip_tokenizer(model_max_length=20)
    return StableDiffusionXLPipeline(
        unet=unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        ),
        vae=autoencoder(shift_factor=None),
        scheduler=EulerDiscreteScheduler.from_config(NOISE, timestep_spacing="leading"),
        tokenizer=clip,
        tokenizer_2=clip,
        text_encoder=CLIPTextModel(clip_config(clip, 8)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(clip, 12)),
    )


def with_ddim(pipeline: Any) -> Any:
    """Whatever scheduler it is published with."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def qwen_image() -> Any:
    tokenizer = tiny_qwen_tokenizer()
    sizes = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)}
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 24}
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.2, 2.0],
    )
    # Else its pictures are nearly grey, whatever the latents.
    torch.nn.init.normal_(vae.decoder.conv_out.weight)
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(num_layers=2, attention_head_dim=16, num_attention_heads=2, **sizes),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=300, shift_terminal=0.02
        ),
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
    )


def z_image() -> Any:
    tokenizer = tiny_qwen_tokenizer()
    sizes = {"in_channels": 4, "dim": 32, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 24}
    axes = {"axes_dims": [4, 6, 6], "axes_lens": [64, 16, 16]}
    transformer = ZImageTransformer2DModel(n_layers=2, n_refiner_layers=1, **sizes, **axes)
    for pad_token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad_token)
    return ZImagePipeline(
        transformer=transformer,
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer,
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=12,
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
    )


def flux2_klein(**config: Any) -> Any:
    from diffusers import Flux2KleinPipeline  # not in 0.36

    tokenizer = tiny_qwen_tokenizer()
    # Features of its layers 9, 18 and 27 are joined.
    encoder = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=27,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    sizes = {"in_channels": 16, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False}
    blocks = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=2,
        latent_channels=4,
    )
    transformer = Flux2Transformer2DModel(**sizes, **blocks)
    # Random ones of their usual size would leave the blocks hardly any part in what comes out.
    for name, weight in transformer.named_parameters():
        if "_modulation" in name:
            weight.data.mul_(8.0)
    mean, variance = batch_statistics(16)
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_(variance)
    return Flux2KleinPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        tokenizer=tokenizer,
        text_encoder=Qwen3ForCausalLM(encoder),
        **config,
    )


def batch_statistics(channels: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1.0, 1.0, channels), torch.linspace(0.5, 2.0, channels)


def normed(latents: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Latents as FLUX.2's model has them from those of its autoencoder, which the pipeline gives."""
    mean, variance = (value.view(-1, 1, 1) for value in batch_statistics(shape[0]))
    return (torch.nn.functional.pixel_unshuffle(latents, 2) - mean) / (variance + 1e-4).sqrt()


PIPELINES = {
    "sd3": SmallPipeline(
        stable_diffusion_3,
        resolutions=((32, 48), (48, 24), (32, 36)),
        guidance_scale=3.5,
        options={"max_sequence_length": LENGTH},
    ),
    "flux": SmallPipeline(
        flux,
        resolutions=((32, 48), (48, 24), (32, 36)),
        guidance_scale=3.5,
        packed=packed,
        unpacked=unpacked,
        options={"max_sequence_length": LENGTH},
    ),
    "sd15": SmallPipeline(
        stable_diffusion,
        resolutions=((32, 48), (48, 24), (32, 36)),
        guidance_scale=3.5,
        prepared=with_ddim,
        settings=("rollout.sampler=ddim", "rollout.eta=1.0"),
    ),
    "sdxl": SmallPipeline(
        stable_diffusion_xl,
        resolutions=((32, 48), (48, 24), (32, 36)),
        guidance_scale=3.5,
        prepared=with_ddim,
        settings=("rollout.sampler=ddim", "rollout.eta=1.0"),
    ),
    "qwen_image": SmallPipeline(
        qwen_image,
        resolutions=((32, 48), (48, 24), (32, 36)),
        guidance_scale=3.5,
        packed=packed,
        unpacked=unpacked,
        options={"max_sequence_length": LENGTH},
        guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": None if scale == 1.0 else ""},
    ),
    "z_image": SmallPipeline(
        z_image,
        resolutions=((32, 48), (48, 24), (32, 36)),
        guidance_scale=3.5,
        options={"max_sequence_length": LENGTH},
        guided=lambda scale: {"guidance_scale": scale - 1.0},
    ),
    "flux2_klein": SmallPipeline(
        flux2_klein,
        resolutions=((32, 48), (48, 24), (32, 36)),
        guidance_scale=4.0,
        unpacked=normed,
        length=64,
        options={"max_sequence_length": 64},
    ),
}
if not hasattr(diffusers, "Flux2KleinPipeline"):
    del PIPELINES["flux2_klein"]
