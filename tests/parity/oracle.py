"""What the oracles of published trainers share: plain Python floats, one latent at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_prob(std: float, means: list[float], drawn: list[float]) -> float:
    """Of one sample, the mean over all its latents."""
    each = [
        -((y - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
        for y, mean in zip(drawn, means, strict=True)
    ]
    return math.fsum(each) / len(each)


def latents(shape: tuple[int, ...], seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def flat(x: Tensor) -> list[list[float]]:
    return x.detach().double().flatten(1).tolist()
