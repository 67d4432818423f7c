"""What most families of diffusers' pipelines do alike."""

from __future__ import annotations

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
from star_trainer.families.loading import load_parts, parts_of, read_config
from star_trainer.families.noising import FLOW, Noising
from star_trainer.families.pipelines.flow_schedule import check_euler, flow_schedule
from star_trainer.families.pipelines.latents import decoded


class DiffusersFamily:
    """A `Family`, which describes the methods, by the names of its classes: a flow model unless told otherwise.

    Attributes:
        model_name, vae_name: classes of diffusers.
        encoders: class of transformers by part of the pipeline.
        optional: parts that a pipeline may have been saved without.
        unused: parts that have no use in training, and what is handed to the pipeline in their place.
        text_description: which tokens the text axis has.
    """

    pipeline_class: str
    model_name: str
    vae_name = "AutoencoderKL"
    encoders: Mapping[str, str]
    optional: Sequence[str] = ()
    unused: Mapping[str, Any] = {}
    published: Mapping[str, Shapes]
    model_part = "transformer"
    noising: Noising = FLOW
    lora_targets: Sequence[str]
    text_description: str

    @property
    def encoder_parts(self) -> Sequence[str]:
        return tuple(self.encoders)

    @property
    def pipeline(self) -> Any:
        """The class of the pipeline.

        Raises:
            ValueError: the installed diffusers has none.
        """
        return _of_diffusers(self.pipeline_class)

    @property
    def model_class(self) -> Any:
        return _of_diffusers(self.model_name)

    def _models(self) -> dict[str, Any]:
        return {self.model_part: self.model_class, "vae": _of_diffusers(self.vae_name)}

    def _encoders(self) -> dict[str, Any]:
        import transformers

        return {part: getattr(transformers, name) for part, name in self.encoders.items()}

    def _left_out(self, source: str) -> set[str]:
        return set(self.optional) - parts_of(self.pipeline, source) if self.optional else set()

    def load(self, source: str, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
        left_out = self._left_out(source)
        kinds = {part: kind for part, kind in (self._models() | self._encoders()).items() if part not in left_out}
        parts = load_parts(kinds, source, dtype, vae_dtype)
        # Those that are left out have to be said as well.
        parts |= dict.fromkeys(left_out) | dict(self.unused)
        pipeline = self.pipeline.from_pretrained(source, **parts, torch_dtype=dtype, use_safetensors=True)
        self.accept(pipeline, source)
        return pipeline

    def accept(self, pipeline: Any, source: str) -> None:
        """Make a loaded pipeline fit for training; ValueError for one that cannot be."""
        check_euler(pipeline.scheduler)
        _say_distilled(getattr(pipeline, self.model_part), self.is_distilled(source))

    def is_distilled(self, source: str) -> bool:
        """Whether a pipeline's guidance was distilled away, where its model's own files do not say so."""
        return False

    def shapes(self, source: str) -> Shapes:
        configurations = {part: kind.config_class for part, kind in self._encoders().items()}
        if source in self.published and not Path(source).is_dir():
            known = self.published[source].items()
            found = {part: configurations[part](**sizes) if part in configurations else sizes for part, sizes in known}
        else:
            left_out = self._left_out(source)
            present = [part for part in configurations if part not in left_out]
            found = {part: kind.load_config(source, subfolder=part) for part, kind in self._models().items()}
            found |= {part: read_config(configurations[part], source, part) for part in present}
        return found | {"is_distilled": self.is_distilled(source)}

    def build_models(self, shapes: Shapes) -> tuple[Any, Any]:
        model, vae = (kind.from_config(shapes[part]) for part, kind in self._models().items())
        _say_distilled(model, shapes["is_distilled"])
        return model, vae

    def build_encoders(self, shapes: Shapes) -> list[Any]:
        return [kind(shapes[part]) for part, kind in self._encoders().items() if part in shapes]

    def num_layers(self, shape: Any) -> int:
        return int(shape.num_layers)

    def guidance_kind(self, shape: Any) -> GuidanceKind | None:
        return None if shape.get("is_distilled") else "two_predictions"

    def attention_heads(self, shape: Any) -> tuple[int, int]:
        return shape.num_attention_heads, shape.attention_head_dim

    def num_text_tokens(self, config: Model, shapes: Shapes) -> int:
        return config.max_sequence_length

    def blocks(self, model: Any) -> Sequence[Any]:
        return list(model.transformer_blocks)

    def unread(self, model: Any) -> Sequence[Any]:
        return ()

    def schedule(
        self, pipeline: Any, config: Model, steps: int, grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        # Most pipelines hand even levels to their scheduler, whatever `model.levels`.
        return flow_schedule(pipeline.scheduler, steps, grid[0] * grid[1], device, even=True)

    def timesteps_at(self, pipeline: Any, levels: Tensor) -> Tensor:
        return levels * pipeline.scheduler.config.num_train_timesteps

    def text_units(
        self, pipeline: Any, config: Model, texts: Sequence[str], units: Sequence[Sequence[str]]
    ) -> sk.TextUnits:
        return sk.TextUnits.from_prompts(texts, units, **text_axis_of(pipeline, config.max_sequence_length))

    def text_axis(self, source: str, max_sequence_length: int) -> TextAxis:
        models = dict.fromkeys((self.model_part, "vae", "scheduler", *self.encoders))
        axis = text_axis_of(self.pipeline.from_pretrained(source, **models), max_sequence_length)
        return TextAxis(**axis, description=f"{max_sequence_length} {self.text_description}")

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
        part = self.model_part
        options = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
        self.pipeline.save_lora_weights(folder, **options)

    def read_adapter(self, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        layers, *_, metadata = self.pipeline.lora_state_dict(source, use_safetensors=True, return_lora_metadata=True)
        return layers, metadata or {}


def _say_distilled(model: Any, is_distilled: bool) -> None:
    if is_distilled:
        model.register_to_config(is_distilled=True)


def _of_diffusers(name: str) -> Any:
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no {name}, a newer one has")
    return kind
