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

    check_processor(layer, JointAttnProcessor2_0, FusedJointAttnProcessor2_0)
    return _JointProcessor(attend)


class _JointProcessor:
    def __init__(self, attend: Attend) -> None:
        from diffusers.models.normalization import RMSNorm

        self.attend = attend
        self.rms_norm = RMSNorm

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
        norms = ((attn.norm_q, attn.norm_added_q), (attn.norm_k, attn.norm_added_k), (None, None))
        query, key, value = (
            _joined(*each, self.rms_norm).transpose(1, 2) for each in zip(image, text, norms, strict=True)
        )

        out = self.attend(query, key, value, num_image_tokens=num_image_tokens, text_first=False)
        out = out.transpose(1, 2).flatten(2)
        image_out, text_out = out[:, :num_image_tokens], out[:, num_image_tokens:]
        if out.dtype != query.dtype:
            # Under autocast diffusers casts `out` there and back, which leaves both dense: the same matrix product.
            image_out, text_out = image_out.contiguous(), text_out.contiguous()
        for module in attn.to_out:
            image_out = module(image_out)
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, N, heads * D] to [B, N, heads, D]."""
    return tensor.unflatten(-1, (heads, -1))


def _joined(image: Tensor, text: Tensor, norms: tuple[Any, Any], rms_norm: Any) -> Tensor:
    """The tokens of `image` and then those of `text`, [B, N, heads, D], each normed by its module."""
    # What is compiled writes into one buffer by itself.
    if not torch.compiler.is_compiling() and all(_ends_in_weight(norm, rms_norm) for norm in norms):
        return _Scaled.apply(*_factors(image, norms[0]), *_factors(text, norms[1]))
    tokens = [each if norm is None else norm(each) for each, norm in zip((image, text), norms, strict=True)]
    return torch.cat(tokens, dim=1)


def _ends_in_weight(norm: Any, rms_norm: Any) -> bool:
    """Whether `norm` is diffusers' RMSNorm, multiplies by its weight last, and nothing else hangs on it."""
    if type(norm) is not rms_norm or norm.weight is None or norm.bias is not None or "forward" in vars(norm):
        return False
    return not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks)


def _factors(tensor: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """What RMSNorm multiplies last, in its own steps: the tokens over their root mean square, and its weight."""
    weight = norm.weight
    variance = tensor.to(torch.float32).pow(2).mean(-1, keepdim=True)
    tensor = tensor * torch.rsqrt(variance + norm.eps)
    return tensor.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else tensor, weight


class _Scaled(torch.autograd.Function):
    """torch.cat([image * image_weight, text * text_weight], dim=1) without the copy."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, image_weight: Tensor, text: Tensor, text_weight: Tensor) -> Tensor:
        batch, num_image_tokens, heads, head_dim = image.shape
        dtype = torch.result_type(image, image_weight)
        out = image.new_empty(batch, num_image_tokens + text.shape[1], heads, head_dim, dtype=dtype)
        torch.mul(image, image_weight, out=out[:, :num_image_tokens])
        torch.mul(text, text_weight, out=out[:, num_image_tokens:])
        ctx.save_for_backward(image, image_weight, text, text_weight)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, image_weight, text, text_weight = ctx.saved_tensors
        gradients: list[Tensor | None] = []
        for factor, weight in ((image, image_weight), (text, text_weight)):
            part, gradient = gradient[:, : factor.shape[1]], gradient[:, factor.shape[1] :]
            gradients += [part * weight, (part * factor).sum((0, 1, 2)) if weight.requires_grad else None]
        return tuple(gradients)
