"""FLUX.2: diffusers' Flux2Transformer2DModel, text first, behind the dispatcher; single blocks fuse QKV and MLP."""

from __future__ import annotations

from typing import Any

from star_kernels.recorder.dispatcher import recording_processor
from star_kernels.recorder.family import Attend, Layer
from star_kernels.recorder.flux import layers as layers

MODEL = "Flux2Transformer2DModel"

checkpointing: str | None = "_gradient_checkpointing_func"


def processor(layer: Layer, attend: Attend) -> Any:
    """Flux2AttnProcessor, or in a single block Flux2ParallelSelfAttnProcessor, through `attend`.

    Raises:
        TypeError: the layer has another processor, as those that cache the keys of reference images.
        ValueError: it runs with context parallelism.
    """
    from diffusers.models.transformers import transformer_flux2

    single = isinstance(layer.attention, transformer_flux2.Flux2ParallelSelfAttention)
    expected = transformer_flux2.Flux2ParallelSelfAttnProcessor if single else transformer_flux2.Flux2AttnProcessor
    return recording_processor(layer, expected, attend, text_first=True)
