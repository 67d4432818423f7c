"""What the trainer asks of a kind of pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import star_kernels as sk
from star_trainer.config import Model
from star_trainer.families.conditioning import Conditioning, Guidance, GuidanceKind, Prediction, VelocityFunction
from star_trainer.families.noising import Noising

# The configuration of each part of a pipeline, by the part's name.
Shapes = Mapping[str, Any]


@dataclass(frozen=True)
class TextAxis:
    """The arguments of `TextUnits.from_prompts` for a pipeline's text tokens, and their lengths in words."""

    tokenizers: Any
    max_lengths: tuple[int, ...]
    description: str
    template: tuple[str, str] = ("", "")
    dropped: int = 0


class Family(Protocol):
    """All that depends on the kind of pipeline; nothing else in the trainer names a class of one.

    `pipeline` is the loaded pipeline, `model` its transformer (or U-Net, which is called a transformer everywhere),
    `shape` that one's configuration, `vae_scale` the pixels of a latent position's side, and `config` the section
    ``model``. Latents are [B, C, H, W] everywhere: a family that packs them does so within `velocity`.
    """

    @property
    def pipeline_class(self) -> str:
        """The name by which ``model_index.json`` knows it."""

    @property
    def published(self) -> Mapping[str, Shapes]:
        """Shapes of published pipelines by name on the hub, for machines that have neither files nor a network."""

    @property
    def model_part(self) -> str:
        """The pipeline's part that is trained, and the prefix of its names in diffusers' adapters."""

    @property
    def noising(self) -> Noising:
        """What noise levels and predictions mean: `noising.FLOW` or `noising.DIFFUSION`."""

    @property
    def encoder_parts(self) -> Sequence[str]:
        """The pipeline's parts that encode prompts, which are on the device only while they do."""

    @property
    def lora_targets(self) -> Sequence[str]:
        """Linear layers that get an adapter unless the configuration names others."""

    @property
    def model_class(self) -> Any:
        """The class of the transformer."""

    def load(self, source: str, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
        """The pipeline, its autoencoder in a precision of its own.

        OSError or ValueError where it, or some of its weights, cannot be had.
        """

    def shapes(self, source: str) -> Shapes:
        """Configurations alone, from files, `published` or a hub; OSError or ValueError where there are none."""

    def build_models(self, shapes: Shapes) -> tuple[Any, Any]:
        """Transformer and autoencoder with random weights, on PyTorch's default device; on meta, without any."""

    def build_encoders(self, shapes: Shapes) -> list[Any]:
        """The text encoders, likewise."""

    def random_pipeline(self, shapes: Shapes, tokenizer: Path) -> Any:
        """A pipeline of these shapes with random weights, and random embeddings for prompts, to measure on.

        `tokenizer`: a folder of a small tokenizer, in the place of the pipeline's.
        """

    def check(self, config: Model, shape: Any, vae_scale: int) -> None:
        """ConfigError for settings of the section that do not suit the model."""

    def num_layers(self, shape: Any) -> int:
        """Blocks whose attention can be recorded."""

    def guidance_kind(self, shape: Any) -> GuidanceKind | None:
        """How a guidance scale above 1 acts; None for a model that has none."""

    def attention_heads(self, shape: Any) -> tuple[int, int]:
        """How many heads the recorded attention has, and the numbers of each: together those of a token."""

    def latent_shape(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""

    def grid(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int]:
        """Image tokens per column and row."""

    def num_text_tokens(self, config: Model, shapes: Shapes) -> int:
        """Length of the text axis."""

    def blocks(self, model: Any) -> Sequence[Any]:
        """What is sharded one by one."""

    def unread(self, model: Any) -> Sequence[Any]:
        """Modules of the model whose output nothing reads, so that their weights never get a gradient."""

    def schedule(
        self, pipeline: Any, config: Model, steps: int, grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Noise levels [steps + 1] and timesteps [steps], as the pipeline's scheduler sets them."""

    def timesteps_at(self, pipeline: Any, levels: Tensor) -> Tensor:
        """Timesteps of noise levels."""

    def encode(self, pipeline: Any, config: Model, text: str, device: torch.device) -> Conditioning:
        """One prompt's conditioning, of one row."""

    def text_units(
        self, pipeline: Any, config: Model, texts: Sequence[str], units: Sequence[Sequence[str]]
    ) -> sk.TextUnits:
        """The prompts' units on the text tokens that `encode` gives."""

    def text_axis(self, source: str, max_sequence_length: int) -> TextAxis:
        """The text tokens, from tokenizers alone; OSError or ValueError where one is missing."""

    def velocity(self, model: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """One call of the model: the prediction [B, C, H, W] at a timestep (0-d, or [B])."""

    def predict(
        self,
        velocity: VelocityFunction,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        guidance: Guidance | None,
    ) -> Prediction:
        """What sampling and training use, from `guidance.passes` calls of `velocity`, the last with the prompts."""

    def pixels(self, pipeline: Any, latents: Tensor, decoder: Any) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], differentiably, by the pipeline's decoder or (not None) another."""

    def save_adapter(self, folder: Path, layers: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write LoRA weights so that the pipeline's `load_lora_weights` reads them."""

    def read_adapter(self, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save_adapter` wrote, names behind `model_part` and a dot; OSError or ValueError without one."""
