"""What a run would need and do, from configuration files alone: no weight is loaded, nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from star_trainer.architectures import ARCHITECTURES
from star_trainer.config import Config, ConfigError
from star_trainer.policy import TINY_PIPELINE, add_adapter, check_against_model

_GIB = 1 << 30
# How many times its input a transformer block keeps for its backward pass, attention maps aside: 34 bytes where a
# number has two (Korthikanti et al. 2022, arXiv 2205.05198).
_ACTIVATION_COPIES = 17


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one device at the fullest moment of an update."""

    weights: float
    trained: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.activations


@dataclass(frozen=True)
class Plan:
    """What a run would need on one device and do per iteration over all of them."""

    parameters: dict[str, int]
    trainable: int
    memory: Memory
    latent: tuple[int, int, int]
    tokens: int
    images: int
    rollout_calls: int
    update_calls: int
    backward_calls: int
    reward_calls: int


def plan(config: Config) -> Plan:
    """Build the pipeline's models on the meta device and count.

    Raises:
        ConfigError: configurations that cannot be read, or settings that the models do not suit.
    """
    shapes = _configurations(config.model.pipeline)
    transformer, vae, encoders = _build(shapes)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    check_against_model(config, transformer, scale)
    frozen = {
        "transformer": _count(transformer),
        "autoencoder": _count(vae),
        "text encoders": sum(_count(encoder) for encoder in encoders),
    }
    if config.model.lora is None:
        trainable = frozen["transformer"]
    else:
        add_adapter(transformer, config.model.lora)
        trainable = _count(transformer) - frozen["transformer"]

    shape = transformer.config
    side = shape.sample_size if config.model.resolution is None else config.model.resolution // scale
    tokens = (
        (side // shape.patch_size) ** 2
        + shapes["text_encoder"].max_position_embeddings
        + config.model.max_sequence_length
    )
    samples = config.rollout.prompts * config.rollout.samples
    guided = config.rollout.guidance_scale > 1.0
    parts = np.array_split(np.arange(samples), config.train.updates)
    batches = sum(math.ceil(len(part) / config.train.batch_size) for part in parts)
    noisy = min(config.rollout.sde_steps or config.rollout.steps, config.rollout.steps)
    trained_steps = max(1, round(config.train.step_fraction * noisy))
    # Guidance runs the unconditional half by itself, and the KL asks the model without adapters for each of the two.
    forward = (2 if guided else 1) * (2 if config.train.kl_weight > 0.0 else 1)
    rollout_batches = math.ceil(samples / config.rollout.batch_size)
    return Plan(
        parameters=frozen,
        trainable=trainable,
        memory=_memory(config, transformer, frozen, trainable, tokens),
        latent=(shape.in_channels, side, side),
        tokens=tokens,
        images=samples,
        rollout_calls=rollout_batches * config.rollout.steps,
        update_calls=batches * trained_steps * forward,
        backward_calls=batches * trained_steps,
        reward_calls=rollout_batches * len(config.reward.terms),
    )


def report(config: Config) -> str:
    """What `plan` found, for a reader."""
    found = plan(config)
    channels, height, width = found.latent
    memory = found.memory
    lines = [
        ("pipeline", config.model.pipeline),
        ("method", f"{config.method}, {config.rollout.sampler}, rewards {', '.join(config.reward.terms)}"),
        *((f"parameters, {name}", f"{count:,}") for name, count in found.parameters.items()),
        ("trainable parameters", f"{found.trainable:,}"),
        ("latent", f"{channels} x {height} x {width}; {found.tokens:,} tokens, text included"),
        ("images per iteration", f"{found.images:,} ({config.rollout.prompts} prompts x {config.rollout.samples})"),
        ("model calls, rollout", f"{found.rollout_calls:,} of up to {config.rollout.batch_size} samples"),
        ("model calls, update", f"{found.update_calls:,}, {found.backward_calls:,} of them with a backward pass"),
        ("reward calls", f"{found.reward_calls:,}"),
        (
            "estimated GPU memory",
            f"{memory.total / _GIB:.1f} GiB: weights {memory.weights / _GIB:.1f}, gradients, optimiser and averages "
            f"{memory.trained / _GIB:.1f}, activations of one backward pass {memory.activations / _GIB:.1f}",
        ),
    ]
    width_of_names = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width_of_names}}  {value}" for name, value in lines)


def _configurations(pipeline: str) -> dict[str, Any]:
    """The configuration of each part of a pipeline, from its folder, a hub, or `ARCHITECTURES`."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, T5Config

    source = str(TINY_PIPELINE) if pipeline == "tiny" else pipeline
    readers: dict[str, Callable[..., Any]] = {
        "transformer": SD3Transformer2DModel.load_config,
        "vae": AutoencoderKL.load_config,
        "text_encoder": CLIPTextConfig.from_pretrained,
        "text_encoder_2": CLIPTextConfig.from_pretrained,
        "text_encoder_3": T5Config.from_pretrained,
    }
    try:
        return {part: read(source, subfolder=part) for part, read in readers.items()}
    except (OSError, ValueError) as error:
        if pipeline not in ARCHITECTURES:
            raise ConfigError(
                f"model.pipeline: {pipeline!r} has no configurations that can be read: {error}"
            ) from error
    known = ARCHITECTURES[pipeline]
    classes = {"text_encoder": CLIPTextConfig, "text_encoder_2": CLIPTextConfig, "text_encoder_3": T5Config}
    return {part: classes[part](**shape) if part in classes else shape for part, shape in known.items()}


def _build(shapes: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """Transformer, autoencoder and text encoders without memory for their weights."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    with torch.device("meta"):
        encoders = [
            CLIPTextModelWithProjection(shapes["text_encoder"]),
            CLIPTextModelWithProjection(shapes["text_encoder_2"]),
            T5EncoderModel(shapes["text_encoder_3"]),
        ]
        transformer = SD3Transformer2DModel.from_config(shapes["transformer"])
        return transformer, AutoencoderKL.from_config(shapes["vae"]), encoders


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _memory(config: Config, transformer: Any, frozen: dict[str, int], trainable: int, tokens: int) -> Memory:
    itemsize = 4 if config.model.dtype == "float32" else 2
    copies = 2 if config.model.lora is None and config.train.kl_weight > 0.0 else 1
    others = frozen["autoencoder"] + frozen["text encoders"]
    held = 0 if config.model.lora is None else frozen["transformer"]
    weights = itemsize * (held + others + (copies - 1) * frozen["transformer"])
    # In float32 whatever the model's dtype: weight, gradient, two moments of AdamW and the moving average.
    trained = 4 * 5 * trainable
    hidden = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    per_block = tokens * hidden * config.train.batch_size * itemsize
    blocks = transformer.config.num_layers
    if config.model.gradient_checkpointing:
        activations = per_block * (blocks + _ACTIVATION_COPIES)
    else:
        activations = per_block * blocks * _ACTIVATION_COPIES
    return Memory(weights, trained, activations)
