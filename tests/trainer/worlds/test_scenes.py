"""The scenes world: prompts that say what their metadata requires, scenes that meet it, a split that holds."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from star_trainer.worlds.requirements import judge
from star_trainer.worlds.scenes import captions as scenes
from star_trainer.worlds.scenes.captions import (
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    is_held_out,
    sample_prompt,
    sample_prompts,
)
from star_trainer.worlds.scenes.detector import detect
from star_trainer.worlds.scenes.renderer import (
    SceneObject,
    object_masks,
    render,
    render_background,
    sample_scene,
    shape_mask,
)

COUNT = 600


def draw(count: int, seed: int = 0, **options: Any) -> list[scenes.Prompt]:
    return sample_prompts(np.random.default_rng(seed), count, **({"held_out": False} | options))


@pytest.fixture(scope="module")
def world() -> tuple[list[scenes.Prompt], list[list[SceneObject]], list[np.ndarray]]:
    """Prompts of both splits, a scene for each, and its picture."""
    rng = np.random.default_rng(7)
    prompts = draw(COUNT // 2) + draw(COUNT // 2, held_out=True)
    objects = [sample_scene(prompt.metadata, rng) for prompt in prompts]
    return prompts, objects, [render(items, rng) for items in objects]


def test_ground_truth_meets_its_prompt_and_hardly_another(world) -> None:
    prompts, _, images = world
    found = [detect(image) for image in images]
    own = [judge(items, prompt.metadata) for items, prompt in zip(found, prompts, strict=True)]
    assert np.mean([verdict.strict for verdict in own]) >= 0.99
    assert np.mean([verdict.graded for verdict in own]) >= 0.995
    order = np.random.default_rng(0).permutation(COUNT)
    others = [judge(found[other], prompt.metadata).strict for other, prompt in zip(order, prompts, strict=True)]
    assert np.mean(others) <= 0.1


@pytest.mark.parametrize("category", CATEGORIES)
def test_ground_truth_of_every_category_meets_its_prompt(category: str) -> None:
    rng = np.random.default_rng(1)
    strict = []
    for _ in range(60):
        prompt = sample_prompt(rng, category)
        assert prompt.metadata["tag"] == category
        strict.append(judge(detect(render(sample_scene(prompt.metadata, rng), rng)), prompt.metadata).strict)
    assert np.mean(strict) >= 0.98


@pytest.mark.parametrize("relation", RELATIONS)
def test_ground_truth_of_every_relation_meets_its_prompt_and_not_the_opposite(relation: str) -> None:
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))[relation]
    rng = np.random.default_rng(2)
    strict, turned = [], []
    while len(strict) < 30:
        metadata = sample_prompt(rng, "position").metadata
        if metadata["include"][1]["position"][0] != relation:
            continue
        found = detect(render(sample_scene(metadata, rng), rng))
        strict.append(judge(found, metadata).strict)
        metadata["include"][1]["position"][0] = opposite
        turned.append(judge(found, metadata).strict)
    assert np.mean(strict) >= 0.96
    assert sum(turned) == 0


def test_prompts_say_what_their_metadata_requires(world) -> None:
    plurals = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
    for prompt in world[0]:
        include = prompt.metadata["include"]
        phrases = []
        for item in include:
            name = item["class"] if item["count"] == 1 else plurals[item["class"]]
            article = {1: "a", 2: "two", 3: "three"}[item["count"]]
            phrases.append(" ".join([article, *([item["color"]] if "color" in item else []), name]))
        if "position" in include[-1]:
            relation, target = include[-1]["position"]
            expected = f"{phrases[-1]} {relation} {phrases[target]}"
        else:
            expected = " and ".join(phrases)
        assert prompt.text == prompt.metadata["prompt"] == f"a photo of {expected}"


def test_units_are_phrases_of_the_prompt_one_for_each_kind_of_object(world) -> None:
    for prompt in world[0]:
        assert len(prompt.units) == len(prompt.metadata["include"])
        for unit in prompt.units:
            assert unit in prompt.text
        for item in prompt.metadata["include"]:
            assert any(item["class"] in unit and item.get("color", "") in unit for unit in prompt.units)


def test_metadata_is_in_genevals_format(world) -> None:
    for prompt in world[0]:
        metadata = prompt.metadata
        assert metadata.keys() <= {"tag", "include", "exclude", "prompt"}
        assert metadata["tag"] in CATEGORIES
        for item in metadata["include"]:
            assert item.keys() <= {"class", "count", "color", "position"}
            assert item["class"] in SHAPES and item.get("color", "red") in COLOURS
        if metadata["tag"] == "counting":
            (item,) = metadata["include"]
            assert metadata["exclude"] == [{"class": item["class"], "count": item["count"] + 1}]
        else:
            assert "exclude" not in metadata


def test_scenes_meet_the_requirements_and_hold_nothing_else(world) -> None:
    prompts, objects, _ = world
    for prompt, items in zip(prompts, objects, strict=True):
        include = prompt.metadata["include"]
        assert Counter(item.shape for item in items) == Counter({i["class"]: i["count"] for i in include})
        for requirement in include:
            ours = [item for item in items if item.shape == requirement["class"]]
            assert all(item.colour == requirement.get("color", item.colour) for item in ours)
            if "position" in requirement:
                relation, target = requirement["position"]
                (item,), (other,) = ours, [o for o in items if o.shape == include[target]["class"]]
                dx, dy = item.x - other.x, item.y - other.y
                along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
                assert along > abs(dx if relation in ("above", "below") else dy)


def test_objects_are_inside_the_picture_and_apart(world) -> None:
    for items in world[1]:
        masks = object_masks(items)
        assert masks.shape == (len(items), 64, 64)
        assert (masks.sum(0) <= 1).all()
        assert not masks[:, [0, -1]].any() and not masks[:, :, [0, -1]].any()
        assert (masks.sum((1, 2)) >= 60).all()


def test_most_of_a_picture_is_background(world) -> None:
    covered = np.array([object_masks(items).any(0).mean() for items in world[1]])
    assert covered.mean() < 0.15 and covered.max() < 0.4


def test_masks_are_where_the_objects_are_drawn(world) -> None:
    for items, image in zip(world[1][:100], world[2][:100], strict=True):
        for item, mask in zip(items, object_masks(items), strict=True):
            gap = np.abs(image[mask].astype(int) - np.array(COLOURS[item.colour])).max(-1)
            # Pixels of the soft edge are mixed with the background.
            assert np.median(gap) <= 10
    assert object_masks([]).shape == (0, 64, 64)


def test_backgrounds_have_no_objects_and_vary() -> None:
    rng = np.random.default_rng(3)
    backgrounds = np.stack([render_background(rng) for _ in range(200)])
    assert backgrounds.dtype == np.float32 and backgrounds.shape == (200, 64, 64, 3)
    assert backgrounds.min() >= 0.0 and backgrounds.max() <= 1.0
    assert all(detect(background) == [] for background in backgrounds)
    means, spreads = backgrounds.mean((1, 2, 3)), backgrounds.std((1, 2)).mean(-1)
    assert means.std() > 0.05
    assert (spreads > 0.005).all(), "a background without texture or gradient"


@pytest.mark.parametrize("size", [64, 96, 128])
def test_pictures_have_the_size_that_is_asked_for(size: int) -> None:
    rng = np.random.default_rng(4)
    items = sample_scene(sample_prompt(rng).metadata, rng, size=size)
    image = render(items, rng, size=size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert object_masks(items, size).shape == (len(items), size, size)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_their_area_and_extent(shape: str) -> None:
    radius = 20.0
    mask = shape_mask(shape, 32.0, 32.0, radius)
    assert mask.shape == (64, 64) and mask.min() == 0.0 and mask.max() == 1.0
    areas = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "cross": 20.0 / 9.0}
    assert mask.sum() == pytest.approx(areas[shape] * radius**2, rel=0.05)
    rows, columns = np.nonzero(mask > 0.5)
    for places in (rows, columns):
        assert places.min() == pytest.approx(12, abs=1.5) and places.max() == pytest.approx(51, abs=1.5)
    assert np.array_equal(mask, mask[:, ::-1]), "shapes are symmetric"


def test_the_triangle_points_up() -> None:
    widths = (shape_mask("triangle", 32.0, 32.0, 20.0) > 0.5).sum(1)
    assert widths[16] < widths[30] < widths[50]


def test_unknown_shapes_and_categories_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape: expected one of circle, .* got 'star'"):
        shape_mask("star", 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"category: expected one of single_object, .* got 'texts'"):
        sample_prompt(np.random.default_rng(0), "texts")


def test_the_splits_are_disjoint_and_every_category_is_on_both_sides() -> None:
    training, held_out = draw(2000), draw(2000, held_out=True)
    assert not {prompt.text for prompt in training} & {prompt.text for prompt in held_out}
    for prompts in (training, held_out):
        seen = Counter(prompt.metadata["tag"] for prompt in prompts)
        assert seen.keys() == set(CATEGORIES)
        relations = {p.metadata["include"][1]["position"][0] for p in prompts if p.metadata["tag"] == "position"}
        assert relations == set(RELATIONS)
        words = " ".join(prompt.text for prompt in prompts).split()
        assert {*COLOURS, "two", "three"} <= set(words)


def test_the_split_is_a_property_of_the_text() -> None:
    for held_out in (False, True):
        assert all(is_held_out(prompt.text) == held_out for prompt in draw(200, held_out=held_out))
    hues, shapes = tuple(COLOURS), SHAPES
    pairs = itertools.product(itertools.permutations(hues, 2), itertools.permutations(shapes, 2))
    texts = [f"a photo of a {a} {s} and a {b} {t}" for (a, b), (s, t) in pairs]
    assert np.mean([is_held_out(text) for text in texts]) == pytest.approx(scenes.HELD_OUT_FRACTION, abs=0.06)


def test_categories_come_by_their_shares() -> None:
    shares = dict(zip(CATEGORIES, scenes._CATEGORY_SHARES, strict=True))
    assert sum(shares.values()) == pytest.approx(1.0)
    seen = Counter(prompt.metadata["tag"] for prompt in draw(3000))
    for category, share in shares.items():
        assert seen[category] / 3000 == pytest.approx(share, abs=0.035)


@pytest.mark.parametrize("held_out", [False, True])
def test_distinct_prompts_are_distinct_also_when_a_category_is_used_up(held_out: bool) -> None:
    prompts = draw(100, held_out=held_out, distinct=True)
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 100


def test_more_distinct_prompts_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"count: found only \d+ distinct prompts of this split, asked for 100000"):
        draw(100_000, held_out=True, distinct=True)


def test_everything_is_a_function_of_the_generator() -> None:
    def world(seed: int) -> tuple[list[str], list[SceneObject], bytes]:
        rng = np.random.default_rng(seed)
        np.random.seed(seed + 100)
        prompts = sample_prompts(rng, 20, held_out=False)
        items = [sample_scene(prompt.metadata, rng) for prompt in prompts]
        pictures = b"".join(render(scene, rng).tobytes() for scene in items)
        return [prompt.text for prompt in prompts], [item for scene in items for item in scene], pictures

    assert world(0) == world(0)
    assert all(a != b for a, b in zip(world(0), world(1), strict=True))


def test_metadata_that_no_scene_can_meet_is_refused() -> None:
    crowd = {"include": [{"class": "circle", "count": 20}]}
    with pytest.raises(ValueError, match="^metadata: found no scene"):
        sample_scene(crowd, np.random.default_rng(0))
