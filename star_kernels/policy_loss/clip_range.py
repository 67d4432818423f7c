"""Clip ranges: their check, and what an image's corresponds to at a position (docs/method.md, section 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

from .._checks import check_number

__all__ = ["position_clip_range"]


@overload
def position_clip_range(image_clip_range: float, height: int, width: int) -> float: ...


@overload
def position_clip_range(image_clip_range: Sequence[float], height: int, width: int) -> tuple[float, float]: ...


def position_clip_range(
    image_clip_range: float | Sequence[float], height: int, width: int
) -> float | tuple[float, float]:
    """The clip range of a position that corresponds to an image's: √(H·W) times as wide.

    For a small update an image's log-ratio, the mean of H·W positions' roughly independent ones, has a spread √(H·W)
    times smaller than theirs, so that this range clips about as many of them (docs/method.md, "Clip range").

    Args:
        image_clip_range: ε of a loop whose ratios are one per image, or its (ε_low, ε_high), at least 0.
        height: H of the latent, in positions of the log-probs [B, H, W] (no pixels, no tokens), at least 1.
        width: W, likewise.

    Returns:
        A number for a number, a pair for a pair: `clip_range` of `policy_loss` at ``granularity="position"``.

    Raises:
        TypeError, ValueError: an argument of another type or outside its range, or a range that would not be below 1
            at a position.
    """
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {size}")
    factor = position_factor(height, width)
    low, high = check_clip_range("image_clip_range", image_clip_range, below=1.0 / factor)
    return (low * factor, high * factor) if isinstance(image_clip_range, (tuple, list)) else low * factor


def position_factor(height: int, width: int) -> float:
    """How many times as far as an image's log-ratio its positions' are spread."""
    return math.sqrt(height * width)


def check_clip_range(name: str, clip_range: object, *, below: float = 1.0) -> tuple[float, float]:
    """Return the bounds of a clip range, one number for both or a pair of them, each in [0, `below`).

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(clip_range, (tuple, list)):
        bound = check_number(name, clip_range, low=0.0, high=below, high_open=True)
        return bound, bound
    if len(clip_range) != 2:
        raise ValueError(f"{name}: expected a number or (low, high), got {len(clip_range)} numbers")
    low, high = (check_number(name, bound, low=0.0, high=below, high_open=True) for bound in clip_range)
    return low, high
