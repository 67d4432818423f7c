"""Find the coloured shapes of the scenes world in any image: segment by hue, label, match pieces with the shapes."""

from __future__ import annotations

import functools

import numpy as np
from scipy import ndimage

from star_trainer.worlds.requirements import DetectedObject
from star_trainer.worlds.scenes.captions import COLOURS, SHAPES
from star_trainer.worlds.scenes.renderer import IMAGE_SIZE, shape_mask

CHROMA_THRESHOLD = 0.3
MINIMUM_AREA = 30
SCORE_THRESHOLD = 0.7

_TEMPLATE_SIZE = 32


def _hue_and_chroma(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hue in degrees and chroma (largest minus smallest channel) of an image [H, W, 3] in [0, 1]."""
    high, low = image.max(-1), image.min(-1)
    chroma = high - low
    red, green, blue = np.moveaxis(image, -1, 0)
    safe = np.maximum(chroma, 1e-6)
    sector = np.where(
        high == red, (green - blue) / safe, np.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    return (sector * 60.0) % 360.0, chroma


@functools.cache
def _palette_hues() -> np.ndarray:
    palette = np.array([list(COLOURS.values())], dtype=np.float32) / 255.0
    return _hue_and_chroma(palette)[0][0]


@functools.cache
def _templates() -> np.ndarray:
    """Each shape drawn to fill a square box: [shapes, 32, 32] bool."""
    half = _TEMPLATE_SIZE / 2
    return np.stack([shape_mask(shape, half, half, half, _TEMPLATE_SIZE) > 0.5 for shape in SHAPES])


def _match(mask: np.ndarray) -> tuple[str, float]:
    """Best shape for a piece cropped to its box, and the overlap (intersection over union) with it."""
    rows = ((np.arange(_TEMPLATE_SIZE) + 0.5) * mask.shape[0] / _TEMPLATE_SIZE).astype(int)
    columns = ((np.arange(_TEMPLATE_SIZE) + 0.5) * mask.shape[1] / _TEMPLATE_SIZE).astype(int)
    piece = mask[rows][:, columns]
    templates = _templates()
    overlap = (templates & piece).sum((1, 2)) / (templates | piece).sum((1, 2))
    # All shapes of this world are as wide as they are high; what is squashed is none of them.
    aspect = min(mask.shape) / max(mask.shape)
    best = int(overlap.argmax())
    return SHAPES[best], float(overlap[best] * min(1.0, aspect / 0.75))


def detect(image: np.ndarray) -> list[DetectedObject]:
    """Detect objects in an image.

    Args:
        image: [H, W, 3], uint8, or float in [0, 1]. Values outside are clipped. Areas scale with the
            image: thresholds are for 64x64.

    Returns:
        Detections with class = shape, confidence = overlap with the ideal shape (at least 0.7).

    Raises:
        ValueError: not [H, W, 3], or not finite.
        TypeError: neither uint8 nor float.
    """
    return [found for found, _ in detect_masks(image)]


def detect_masks(image: np.ndarray) -> list[tuple[DetectedObject, np.ndarray]]:
    """`detect`, and with each object the pixels that are its own, [H, W] bool."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"image: expected shape [H, W, 3], got {list(image.shape)}")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"image: expected uint8, or float in [0, 1], got {image.dtype}")
    pixels = image.astype(np.float32) / 255.0 if image.dtype == np.uint8 else image.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("image: expected finite values, got NaN or infinity")
    hue, chroma = _hue_and_chroma(np.clip(pixels, 0.0, 1.0))
    gaps = np.abs((hue[..., None] - _palette_hues() + 180.0) % 360.0 - 180.0)
    nearest = gaps.argmin(-1)
    minimum_area = MINIMUM_AREA * image.shape[0] * image.shape[1] / IMAGE_SIZE**2
    found = []
    for index, colour in enumerate(COLOURS):
        labels, count = ndimage.label((chroma > CHROMA_THRESHOLD) & (nearest == index))
        windows = ndimage.find_objects(labels, count)
        # Areas of all pieces at once: a noisy picture has thousands.
        for label in np.flatnonzero(np.bincount(labels.ravel(), minlength=1)[1:] >= minimum_area) + 1:
            window = windows[label - 1]
            piece = labels[window] == label
            shape, score = _match(piece)
            if score >= SCORE_THRESHOLD:
                rows, columns = window
                box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
                mask = np.zeros(image.shape[:2], dtype=bool)
                mask[window] = piece
                found.append((DetectedObject(shape, score, colour, box), mask))
    return found
