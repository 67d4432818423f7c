"""Stable Diffusion 3: diffusers' SD3Transformer2DModel, whose joint attention has the image tokens first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels.recorder.family import Attend, Layer, check_processor

MODEL = "SD3Transformer2DModel"

checkpointing: str | None = "_gradient_checkpointing_func"


def layers(model: Any) -> list[Layer]:
    """The joint attention of each block, and not the image-only attention that dual blocks have beside it."""
    return [
        Layer(f"transformer_blocks.{i}.attn", block.attn, block) for i, block in enumerate(model.transformer_blocks)
    ]


def processor(layer: Layer, attend: Attend) -> _JointProcessor:
    """JointAttnProcessor2_0 through `attend`.

    Raises:
        TypeError: the layer has another processor.
    """
    from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0

    fused = isinstance(layer.attention.processor, FusedJointAttnProcessor2_0)
    check_processor(layer, JointAttnProcessor2_0, "; call unfuse_qkv_projections() first" if fused else "")
    return _JointProcessor(attend)


class _JointProcessor:
    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    # diffusers reads the names of these parameters, and passes only what they name.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        num_image_tokens = hidden_states.shape[1]
        image = [_heads(project(hidden_states), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v)]
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = [_heads(project(encoder_hidden_states), attn.heads) for project in projections]
        for tensors, norms in ((image, (attn.norm_q, attn.norm_k)), (text, (attn.norm_added_q, attn.norm_added_k))):
            for i, norm in enumerate(norms):
                if norm is not None:
                    tensors[i] = norm(tensors[i])
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))

        out = self.attend(query, key, value, num_image_tokens=num_image_tokens, text_first=False)
        out = out.transpose(1, 2).flatten(2)
        image_out, text_out = out[:, :num_image_tokens], out[:, num_image_tokens:]
        for module in attn.to_out:
            image_out = module(image_out)
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, N, heads * D] to [B, heads, N, D]."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
