"""Stable Diffusion 1, 2 and XL: diffusers' UNet2DConditionModel, whose image tokens attend to the text alone.

Its cross-attention stands at several resolutions. Self-attention is left as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from star_kernels.recorder.family import Attend, Layer, check_processor

MODEL = "UNet2DConditionModel"

checkpointing: str | None = "_gradient_checkpointing_func"


def layers(model: Any) -> list[Layer]:
    """The cross-attention (attn2) of every transformer block, in the order in which they run: down, middle, up.

    Raises:
        TypeError: the model attends to text in other blocks than diffusers' Transformer2DModel, or nowhere.
    """
    from diffusers import Transformer2DModel

    stages = [(f"down_blocks.{i}", stage) for i, stage in enumerate(model.down_blocks)]
    stages += [("mid_block", model.mid_block)]
    stages += [(f"up_blocks.{i}", stage) for i, stage in enumerate(model.up_blocks)]
    found = []
    for stage_name, stage in stages:
        if not getattr(stage, "has_cross_attention", False):
            continue
        for i, transformer in enumerate(stage.attentions):
            if not isinstance(transformer, Transformer2DModel):
                raise TypeError(
                    f"{stage_name}.attentions.{i}: expected a Transformer2DModel, whose cross-attention is recorded, "
                    f"got {type(transformer).__name__}"
                )
            name = f"{stage_name}.attentions.{i}.transformer_blocks"
            found += [
                Layer(f"{name}.{j}.attn2", block.attn2, block, caller=transformer)
                for j, block in enumerate(transformer.transformer_blocks)
            ]
    if not found:
        raise TypeError(f"transformer: expected a {MODEL} with cross-attention, got one without")
    return found


def processor(layer: Layer, attend: Attend) -> _CrossProcessor:
    """AttnProcessor2_0 through `attend`.

    Raises:
        TypeError: the layer has another processor, as with an IP adapter.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0

    check_processor(layer, AttnProcessor2_0, FusedAttnProcessor2_0)
    return _CrossProcessor(attend)


class _CrossProcessor:
    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    # diffusers reads the names of these parameters, and passes only what they name.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Image tokens [B, h·w, C] and text tokens [B, N_text, D] to the shape of the first."""
        if attention_mask is not None:
            raise ValueError(
                f"encoder_attention_mask: expected None in a layer that is recorded, got {list(attention_mask.shape)}"
            )
        query, key, value = (
            project(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, tokens in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        out = self.attend(query, key, value, num_image_tokens=query.shape[2], text_first=False)
        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        for module in attn.to_out:
            out = module(out)
        return out / attn.rescale_output_factor
