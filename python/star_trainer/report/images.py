"""Pictures and maps small enough to stand inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image

# Longest sides that are tried, one after the other, until all pictures fit.
_SIDES = (384, 256, 192, 128, 96, 64)
# Up to this side a picture is kept to the bit, if it is not shrunk.
_EXACT = 128
_MOST_TOKENS = 32


def data_uris(images: Sequence[np.ndarray], budget: int) -> list[str]:
    """Images [H, W, 3] uint8 as ``data:`` addresses of at most `budget` characters together, shrunk to fit."""
    for side in _SIDES[:-1]:
        found: list[str] = []
        size = 0
        for image in images:
            found.append(_data_uri(image, side))
            size += len(found[-1])
            if size > budget:
                break
        else:
            return found
    return [_data_uri(image, _SIDES[-1]) for image in images]


def _data_uri(image: np.ndarray, side: int) -> str:
    picture = Image.fromarray(np.ascontiguousarray(image))
    kind, options = ("png", {}) if max(picture.size) <= min(side, _EXACT) else ("jpeg", {"quality": 80})
    picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    content = io.BytesIO()
    picture.save(content, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def packed_maps(maps: np.ndarray, largest: float) -> tuple[list[int], str]:
    """The grid [h, w], at most 32 of a side, and maps [..., h, w] in [0, `largest`] as 16 bits each, in base64."""
    height, width = maps.shape[-2:]
    size = (min(width, _MOST_TOKENS), min(height, _MOST_TOKENS))
    flat = np.nan_to_num(maps.reshape(-1, height, width).astype(np.float32), posinf=largest)
    if size != (width, height):
        flat = np.stack([np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BOX)) for each in flat])
    levels = np.clip(np.round(flat / largest * 65535.0), 0, 65535).astype("<u2")
    return [size[1], size[0]], base64.b64encode(levels.tobytes()).decode()


def colour_range(weights: np.ndarray) -> tuple[float, float]:
    """The range of the colours of weights, around the uniform weight of 1; a few extreme tokens do not stretch it."""
    finite = weights[np.isfinite(weights)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (1.0, 1.0)
    # Nearly uniform maps should look so.
    return min(float(low), 0.8), max(float(high), 1.2)


def colour_table() -> list[str]:
    """Cividis as 256 colours for CSS: dark blue to yellow, its brightness even to the colour-blind, grey in between."""
    colours = np.round(matplotlib.colormaps["cividis"](np.arange(256))[:, :3] * 255.0).astype(int)
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours.tolist()]
