"""Inputs and baselines of the attention benchmarks, on the CPU and on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from star_trainer.studies.cost import attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import star_kernels as sk
from star_kernels.attention import sdpa as pytorch


@dataclass(frozen=True)
class Shape:
    """What one joint attention of the model sees, per call."""

    name: str
    batch: int
    heads: int
    head_dim: int
    image: int
    text: int
    units: int

    @property
    def tokens(self) -> int:
        return self.image + self.text

    @property
    def operations(self) -> int:
        """Floating-point operations of the two matrix products of the forward pass, softmax and capture left out."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.head_dim

    def __str__(self) -> str:
        return (
            f"{self.name}, B {self.batch}, {self.heads} heads x {self.head_dim}, {self.image} + {self.text} tokens, "
            f"K {self.units}"
        )


def sd35_medium(name: str, batch: int, units: int = 8) -> Shape:
    """S and L: Stable Diffusion 3.5 medium at 512 and at 1024 px."""
    image, text = {"S": (1024, 205), "L": (4096, 333)}[name]
    return Shape(name, batch, heads=24, head_dim=64, image=image, text=text, units=units)


def flux(batch: int, units: int = 8) -> Shape:
    """F: FLUX at 1024 px, whose text stands before the image."""
    return Shape("F", batch, heads=24, head_dim=128, image=4096, text=512, units=units)


@dataclass(frozen=True)
class Inputs:
    """query, key, value [B, heads, N, D], image tokens first; unit_weights [B, N_text, K]."""

    query: Tensor
    key: Tensor
    value: Tensor
    unit_weights: Tensor
    num_image_tokens: int

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Normal queries, keys and values."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (shape.batch, shape.heads, shape.tokens, shape.head_dim)
    query, key, value = (torch.randn(sizes, generator=generator, device=device).to(dtype) for _ in range(3))
    return Inputs(query, key, value, make_unit_weights(shape, device), shape.image)


def make_unit_weights(shape: Shape, device: torch.device) -> Tensor:
    """Unit k is three text tokens that stand together, as a phrase of a prompt does."""
    length = min(3, shape.text)
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(shape.text - length + 1, (shape.batch, shape.units), generator=generator)
    unit_weights = torch.zeros(shape.batch, shape.text, shape.units)
    for offset in range(length):
        unit_weights.scatter_(1, (first + offset)[:, None], 1.0)
    return unit_weights.to(device)


def fused(
    inputs: Inputs, *, capture: bool, backend: str, implementation: Literal["fused", "sdpa"] = "fused"
) -> tuple[Tensor, Tensor | None]:
    """The library's attention, with or without the mass."""
    return sk.joint_attention(
        *inputs.qkv,
        inputs.unit_weights if capture else None,
        num_image_tokens=inputs.num_image_tokens,
        implementation=implementation,
        backend=backend,
    )


sdpa = functools.partial(fused, implementation="sdpa")


def text_column_pass(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """PyTorch's flash attention, then the text columns once more."""
    return attention.text_column_pass(*inputs.qkv, inputs.unit_weights, num_image_tokens=inputs.num_image_tokens)


def materialised(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The softmax written out."""
    return attention.materialised(*inputs.qkv, inputs.unit_weights, num_image_tokens=inputs.num_image_tokens)


def members(inputs: Inputs, backend: str) -> dict[str, Callable[[], object]]:
    """What is compared, by name; "SDPA" is the baseline and captures nothing."""
    return {
        "SDPA, no capture": functools.partial(scaled_dot_product_attention, *inputs.qkv),
        "fused, no capture": functools.partial(fused, inputs, capture=False, backend=backend),
        "fused, capture": functools.partial(fused, inputs, capture=True, backend=backend),
        "sdpa, no capture": functools.partial(sdpa, inputs, capture=False, backend=backend),
        "sdpa, capture": functools.partial(sdpa, inputs, capture=True, backend=backend),
        "SDPA, then text columns": functools.partial(text_column_pass, inputs),
        "materialised": functools.partial(materialised, inputs),
        "materialised, reference": functools.partial(fused, inputs, capture=True, backend="reference"),
    }


def mass_members(inputs: Inputs, backend: str) -> dict[str, Callable[[], object]]:
    """The mass from the log-sum-exp by itself, beside PyTorch's attention, which is the baseline."""
    query, key, unit_weights, n = inputs.query, inputs.key, inputs.unit_weights, inputs.num_image_tokens
    kernel = pytorch.kernel_for(query, key.shape[2])
    assert kernel is not None
    _, log_sum_exp = pytorch.attention(kernel, *inputs.qkv, query.shape[3] ** -0.5)
    images, texts = slice(0, n), slice(n, None)
    image_rows = query[:, :, images], key[:, :, texts]
    text_rows = query[:, :, texts], key[:, :, images]
    dense = torch.rand(unit_weights.shape, generator=torch.Generator().manual_seed(2)).to(unit_weights.device)
    of_images, of_texts = log_sum_exp[:, :, images], log_sum_exp[:, :, texts]
    mass = functools.partial(functools.partial, sk.attention_mass)
    return {
        "SDPA, no capture": functools.partial(scaled_dot_product_attention, *inputs.qkv),
        "mass of phrases": mass(*image_rows, unit_weights, of_images, backend=backend),
        "mass of every token": mass(*image_rows, dense, of_images, backend=backend),
        "text to image, phrases": mass(*text_rows, unit_weights, of_texts, direction="text_to_image", backend=backend),
        "text to image, every token": mass(*text_rows, dense, of_texts, direction="text_to_image", backend=backend),
        "mass of phrases, reference": mass(*image_rows, unit_weights, of_images, backend="reference"),
    }
