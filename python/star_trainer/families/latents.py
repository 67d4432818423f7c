"""Sizes of latents, which the families share."""

from __future__ import annotations

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
