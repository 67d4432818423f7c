"""Sizes of latents, how they are packed into tokens, and the pixels that they stand for, which families share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from star_trainer.config import ConfigError, Model


def check_resolution(config: Model, step: int, largest: int | None = None) -> None:
    """Refuse an image whose sides are no multiples of `step` pixels, or above `largest`.

    Raises:
        ConfigError: with the step.
    """
    size = config.size
    if size is not None and any(side % step or side > (largest or side) for side in size):
        limit = "" if largest is None else f" up to {largest}"
        given = config.resolution if isinstance(config.resolution, int) else list(size)
        raise ConfigError(f"model.resolution: expected multiples of {step}{limit}, got {given}")


def latent_size(config: Model, default: int, vae_scale: int) -> tuple[int, int]:
    """Height and width of a latent: those of ``model.resolution``, or a square of side `default`."""
    if config.size is None:
        return default, default
    height, width = config.size
    return height // vae_scale, width // vae_scale


def vae_scale(vae: Any) -> int:
    """Pixels of a latent position's side, as the pipeline of an autoencoder has them."""
    halvings = vae.config.get("temperal_downsample")
    return int(2 ** (len(vae.config.block_out_channels) - 1 if halvings is None else len(halvings)))


def padded(text: Tensor, length: int) -> Tensor:
    """[B, N, D] with zeros behind it, [B, length, D]."""
    return pad(text, (0, 0, 0, length - text.shape[1]))


def pack(latents: Tensor, patch: int = 2) -> Tensor:
    """Tokens [B, h·w, C·patch²] of latents [B, C, H, W], row by row, of each the channel, its row and its column."""
    return pixel_unshuffle(latents, patch).flatten(2).mT.contiguous()


def unpack(tokens: Tensor, grid: tuple[int, int], patch: int = 2) -> Tensor:
    """Latents [B, C, H, W] of tokens [B, h·w, C·patch²] on a grid (h, w)."""
    return pixel_shuffle(tokens.mT.unflatten(2, grid), patch)


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] by an autoencoder whose latents are shifted and scaled."""
    unscaled = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return (vae.decode(unscaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
