"""The oracle's maps: the advantage goes to the objects that the prompt names, and evenly where there are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from star_trainer.config import Allocation, ConfigError, load_config
from star_trainer.prompts import Prompt
from star_trainer.worlds.scenes.captions import COLOURS
from star_trainer.worlds.scenes.oracle import true_maps, true_mass
from star_trainer.worlds.scenes.renderer import SceneObject, shape_mask

SQUARE = SceneObject("square", "red", 16.0, 16.0, 8.0)
CIRCLE = SceneObject("circle", "blue", 48.0, 48.0, 10.0)


def picture(*objects: SceneObject) -> np.ndarray:
    canvas = np.full((64, 64, 3), 120.0)
    for item in objects:
        coverage = shape_mask(item.shape, item.x, item.y, item.radius)[..., None]
        canvas = canvas * (1 - coverage) + np.array(COLOURS[item.colour]) * coverage
    return canvas.round().astype(np.uint8)


def prompt(*classes: str) -> Prompt:
    return Prompt("a scene", {"include": [{"class": name, "count": 1} for name in classes]})


def test_only_named_objects_have_mass_and_each_its_own_unit() -> None:
    images = np.stack([picture(SQUARE, CIRCLE)] * 3)
    mass = true_mass(images, [prompt("square"), prompt("circle", "square"), prompt("cross")], (8, 8))
    assert mass.shape == (3, 64, 2)
    # The square covers tokens 1 and 2 of each side whole.
    square = torch.zeros(8, 8)
    square[1:3, 1:3] = 1.0
    assert torch.equal(mass[0, :, 0].view(8, 8), square) and mass[0, :, 1].sum() == 0
    assert torch.equal(mass[1, :, 1].view(8, 8), square)
    area = float(mass[1, :, 0].sum()) * 64
    assert area == pytest.approx(np.pi * CIRCLE.radius**2, rel=0.1)
    assert mass[2].sum() == 0


def test_weights_have_mean_one_and_are_even_without_the_object() -> None:
    images = np.stack([picture(SQUARE), picture(SQUARE)])
    maps = true_maps(images, [prompt("square"), prompt("circle")], (8, 8), Allocation(), 1)[0]
    assert maps[0].mean().item() == pytest.approx(1.0) and maps[0, 1, 1] == 16.0 and maps[0, 5, 5] == 0.0
    assert torch.equal(maps[1], torch.ones(8, 8))


def test_steps_of_the_oracle_have_their_own_strength() -> None:
    images = picture(SQUARE)[None]
    mixed = true_maps(images, [prompt("square")], (8, 8), Allocation(strength=[0.0, 1.0, 0.5]), 4)[:, 0]
    whole = true_maps(images, [prompt("square")], (8, 8), Allocation(), 1)[0, 0]
    assert torch.equal(mixed[0], torch.ones(8, 8)) and torch.equal(mixed[1], whole)
    assert torch.equal(mixed[2], 0.5 + 0.5 * whole) and torch.equal(mixed[3], mixed[2])


def test_an_object_of_another_colour_is_still_what_the_prompt_names() -> None:
    wrong = SceneObject("square", "green", 16.0, 16.0, 8.0)
    assert true_mass(picture(wrong)[None], [prompt("square")], (8, 8)).sum() == 4.0


def test_files_of_prompts_have_no_truth(tmp_path) -> None:
    with pytest.raises(ConfigError, match="oracle"):
        load_config("tiny", ["method=oracle", "prompts.source=a.jsonl", "prompts.held_out=b.jsonl"])
