"""Qwen-Image: diffusers' QwenImageTransformer2DModel, whose text is first, masked by length, behind the dispatcher."""

from __future__ import annotations

from typing import Any

from star_kernels.recorder.dispatcher import recording_processor
from star_kernels.recorder.family import Attend, Layer
from star_kernels.recorder.sd3 import layers as layers

MODEL = "QwenImageTransformer2DModel"

checkpointing: str | None = "_gradient_checkpointing_func"


def processor(layer: Layer, attend: Attend) -> Any:
    """QwenDoubleStreamAttnProcessor2_0 through `attend`.

    It takes ``encoder_hidden_states_mask`` into the attention in the releases of diffusers that do, from 0.37 on.

    Raises:
        TypeError: the layer has another processor.
        ValueError: it runs with context parallelism.
    """
    from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

    return recording_processor(layer, QwenDoubleStreamAttnProcessor2_0, attend, text_first=True, masks_text=True)
