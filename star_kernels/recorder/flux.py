"""FLUX.1: diffusers' FluxTransformer2DModel, whose attention has the text tokens first and goes by the dispatcher."""

from __future__ import annotations

from typing import Any

from star_kernels.recorder.dispatcher import recording_processor
from star_kernels.recorder.family import Attend, Layer

MODEL = "FluxTransformer2DModel"

checkpointing: str | None = "_gradient_checkpointing_func"


def layers(model: Any) -> list[Layer]:
    """The attention of each dual block, then of each single block, in which text and image are one sequence."""
    texts = {"transformer_blocks": None, "single_transformer_blocks": model.context_embedder}
    return [
        Layer(f"{blocks}.{i}.attn", block.attn, block, text)
        for blocks, text in texts.items()
        for i, block in enumerate(getattr(model, blocks))
    ]


def processor(layer: Layer, attend: Attend) -> Any:
    """FluxAttnProcessor through `attend`.

    Raises:
        TypeError: the layer has another processor, as with an IP adapter.
        ValueError: it runs with context parallelism.
    """
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    return recording_processor(layer, FluxAttnProcessor, attend, text_first=True)
