"""Z-Image: diffusers' ZImageTransformer2DModel, one stream of image, then text, of lengths that differ by row."""

from __future__ import annotations

import inspect
from typing import Any

from star_kernels.recorder.dispatcher import recording_processor
from star_kernels.recorder.family import Attend, Layer, Layout

MODEL = "ZImageTransformer2DModel"

checkpointing: str | None = "_gradient_checkpointing_func"


def layers(model: Any) -> list[Layer]:
    """The attention of each main block, and not that of the refiners, which have image or text alone."""
    return [Layer(f"layers.{i}.attention", block.attention, block) for i, block in enumerate(model.layers)]


def processor(layer: Layer, attend: Attend) -> Any:
    """ZSingleStreamAttnProcessor through `attend`.

    Raises:
        TypeError: the layer has another processor.
        ValueError: it runs with context parallelism.
    """
    from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

    return recording_processor(layer, ZSingleStreamAttnProcessor, attend, text_first=False, masks_text=True)


def layout(model: Any, *args: Any, **kwargs: Any) -> Layout:
    """Image tokens, then text, each filled up to a multiple of 32 with tokens that take part and stand for nothing.

    Raises:
        ValueError: several images for a row, or images of unlike sizes.
    """
    from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

    call = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
    call.apply_defaults()
    latents, patch, frame_patch = (call.arguments[name] for name in ("x", "patch_size", "f_patch_size"))
    if any(isinstance(latent, (list, tuple)) for latent in latents):
        raise ValueError("x: expected one latent for each row of a model that is recorded, got several for a row")
    sizes = {tuple(latent.shape[1:]) for latent in latents}
    if len(sizes) > 1:
        raise ValueError(f"x: expected latents of one size in a model that is recorded, got {sorted(sizes)}")
    frames, height, width = sizes.pop()
    image = (frames // frame_patch) * (height // patch) * (width // patch)
    captions = [len(caption) for caption in call.arguments["cap_feats"]]
    text_begin = image + -image % SEQ_MULTI_OF
    longest = max(captions)
    return Layout(image, text_begin, text_begin + longest + -longest % SEQ_MULTI_OF, captions)
