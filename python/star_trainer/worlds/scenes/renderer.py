"""Scenes as pictures: one to three coloured shapes on a background that no prompt mentions, and their true masks.

Everything is a pure function of a numpy generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from star_trainer.worlds.scenes.captions import COLOURS, SHAPES, pick

IMAGE_SIZE = 64
RADII = (7.5, 8.75, 10.0)
GRID = 8


@dataclass(frozen=True)
class SceneObject:
    """A shape of one colour; centre and radius in pixels, y downwards."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


def shape_mask(shape: str, x: float, y: float, radius: float, size: int = IMAGE_SIZE) -> np.ndarray:
    """Coverage of each pixel by a shape, [size, size] float32 in [0, 1], with edges one pixel soft."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    dx, dy = columns - x, rows - y
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - radius
    elif shape == "triangle":
        slope = math.hypot(2.0, 1.0)
        sides = (2.0 * np.abs(dx) - dy - radius) / slope
        distance = np.maximum(sides, dy - radius)
    elif shape == "cross":
        arm = radius / 3.0
        upright = np.maximum(np.abs(dx) - arm, np.abs(dy) - radius)
        lying = np.maximum(np.abs(dx) - radius, np.abs(dy) - arm)
        distance = np.minimum(upright, lying)
    else:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def _muted_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours of low chroma, which cannot be taken for an object's, and of a contrast that leaves objects clear."""
    grey = rng.uniform(0.3, 0.8)
    first = grey + rng.uniform(-0.06, 0.06, 3)
    second = first + rng.uniform(0.08, 0.18) * rng.choice((-1.0, 1.0)) + rng.uniform(-0.03, 0.03, 3)
    return np.clip(first, 0.0, 1.0).astype(np.float32), np.clip(second, 0.0, 1.0).astype(np.float32)


def render_background(rng: np.random.Generator, size: int = IMAGE_SIZE) -> np.ndarray:
    """A background without objects, [size, size, 3] float32 in [0, 1]."""
    first, second = _muted_pair(rng)
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0.0, 2.0 * math.pi)
    along = math.cos(angle) * columns + math.sin(angle) * rows
    kind = rng.integers(5)
    if kind == 0:
        blend = along - along.min()
        blend = blend / blend.max()
    elif kind == 1:
        centre = rng.uniform(0.2, 0.8, 2)
        blend = np.clip(np.hypot(columns - centre[0], rows - centre[1]), 0.0, 1.0)
    elif kind == 2:
        blend = 0.5 + 0.5 * np.sin(2.0 * math.pi * (along * rng.uniform(2.0, 5.0) + rng.uniform()))
    elif kind == 3:
        cells = rng.integers(3, 6)
        shift = rng.uniform(0.0, 1.0, 2)
        checks = np.floor(columns * cells + shift[0]) + np.floor(rows * cells + shift[1])
        blend = checks % 2
    else:
        coarse = rng.uniform(0.0, 1.0, (5, 5)).astype(np.float32)
        grid = np.linspace(0.0, 3.999, size)
        low = grid.astype(int)
        part = (grid - low).astype(np.float32)
        part = part * part * (3.0 - 2.0 * part)
        top = coarse[low][:, low] * (1 - part) + coarse[low][:, low + 1] * part
        bottom = coarse[low + 1][:, low] * (1 - part) + coarse[low + 1][:, low + 1] * part
        blend = top * (1 - part[:, None]) + bottom * part[:, None]
    blend = blend[..., None].astype(np.float32)
    return first * (1.0 - blend) + second * blend


def render(objects: Sequence[SceneObject], rng: np.random.Generator, size: int = IMAGE_SIZE) -> np.ndarray:
    """Draw objects, first to last, on a random background: [size, size, 3] uint8."""
    canvas = render_background(rng, size)
    for item in objects:
        colour = np.clip(np.array(COLOURS[item.colour]) / 255.0 + rng.uniform(-0.03, 0.03, 3), 0.0, 1.0)
        coverage = shape_mask(item.shape, item.x, item.y, item.radius, size)[..., None]
        canvas = canvas * (1.0 - coverage) + colour.astype(np.float32) * coverage
    return np.round(canvas * 255.0).astype(np.uint8)


def object_masks(objects: Sequence[SceneObject], size: int = IMAGE_SIZE) -> np.ndarray:
    """True masks of the objects, [len(objects), size, size] bool."""
    masks = [shape_mask(item.shape, item.x, item.y, item.radius, size) > 0.5 for item in objects]
    return np.stack(masks) if masks else np.zeros((0, size, size), dtype=bool)


def _required_objects(metadata: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [
        (requirement["class"], requirement.get("color"))
        for requirement in metadata["include"]
        for _ in range(requirement["count"])
    ]


def _in_relation(first: SceneObject, second: SceneObject, relation: str) -> bool:
    """Whether `first` stands clearly in `relation` to `second`: the offset's main axis is the relation's."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1.0 if relation in ("left of", "above") else 1.0
    return sign * along > 1.3 * abs(across) + 2.0


def sample_scene(metadata: dict[str, Any], rng: np.random.Generator, size: int = IMAGE_SIZE) -> list[SceneObject]:
    """Draw a scene that meets a prompt's requirements and holds nothing else; what they leave open is random.

    Centres lie on a grid of 8 pixels and sizes are three, so that a small model learns the shapes in minutes.

    Raises:
        ValueError: 1000 attempts found no such scene, as for a dozen objects.
    """
    required = _required_objects(metadata)
    gap = 3.0
    for _ in range(1000):
        placed: list[SceneObject] = []
        for shape, colour in required:
            for _ in range(40):
                radius = float(rng.choice(RADII))
                x, y = GRID * rng.integers(2, size // GRID - 1, 2)
                clear = all(max(abs(x - o.x), abs(y - o.y)) > radius + o.radius + gap for o in placed)
                if clear:
                    hue = colour or pick(rng, tuple(COLOURS))[0]
                    placed.append(SceneObject(shape, hue, float(x), float(y), float(radius)))
                    break
            else:
                break
        if len(placed) < len(required):
            continue
        relations = [
            (index, requirement["position"])
            for index, requirement in enumerate(metadata["include"])
            if "position" in requirement
        ]
        if all(_in_relation(placed[index], placed[target], relation) for index, (relation, target) in relations):
            return placed
    raise ValueError(f"metadata: found no scene of {size}x{size} pixels for {metadata['include']}")
