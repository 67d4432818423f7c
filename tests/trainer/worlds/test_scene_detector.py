"""The detector of the scenes world: finds what is there, in any picture, and nothing where there is nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from star_trainer.worlds.requirements import DetectedObject
from star_trainer.worlds.scenes.captions import COLOURS, SHAPES, sample_prompt
from star_trainer.worlds.scenes.detector import SCORE_THRESHOLD, detect, detect_masks
from star_trainer.worlds.scenes.renderer import SceneObject, render, sample_scene, shape_mask


def plain(objects: list[SceneObject], size: int = 64, grey: int = 120) -> np.ndarray:
    """Objects on one grey, [size, size, 3] uint8."""
    canvas = np.full((size, size, 3), float(grey))
    for item in objects:
        coverage = shape_mask(item.shape, item.x, item.y, item.radius, size)[..., None]
        canvas = canvas * (1 - coverage) + np.array(COLOURS[item.colour]) * coverage
    return canvas.round().astype(np.uint8)


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [render(sample_scene(sample_prompt(rng).metadata, rng), rng) for _ in range(count)]


def summary(found: list[DetectedObject]) -> list[tuple[str, str | None]]:
    return sorted((item.name, item.colour) for item in found)


@pytest.mark.parametrize("radius", [6.0, 8.0, 11.0, 24.0])
def test_every_shape_is_found_in_every_colour_where_it_is(radius: float) -> None:
    rng = np.random.default_rng(0)
    for shape, colour in itertools.product(SHAPES, COLOURS):
        x, y = rng.uniform(radius + 1, 63 - radius, 2)
        (found,) = detect(plain([SceneObject(shape, colour, x, y, radius)], grey=int(rng.integers(60, 220))))
        assert (found.name, found.colour) == (shape, colour)
        assert SCORE_THRESHOLD <= found.score <= 1.0
        # The tip of a triangle is less than a pixel wide, and mixed with the background.
        assert np.abs(np.array(found.box) - (x - radius, y - radius, x + radius, y + radius)).max() < 3.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_shape_scores_nearly_one(shape: str) -> None:
    (found,) = detect(plain([SceneObject(shape, "red", 32.0, 32.0, 24.0)]))
    assert found.score > 0.85


def test_objects_of_different_colours_are_told_apart_where_they_touch() -> None:
    objects = [SceneObject("square", "red", 20.0, 32.0, 9.0), SceneObject("square", "blue", 38.0, 32.0, 9.0)]
    assert summary(detect(plain(objects))) == [("square", "blue"), ("square", "red")]


def test_objects_of_one_colour_are_told_apart_where_they_do_not_touch() -> None:
    objects = [SceneObject("circle", "green", x, 32.0, 8.0) for x in (12.0, 32.0, 52.0)]
    assert summary(detect(plain(objects))) == [("circle", "green")] * 3


@pytest.mark.parametrize("grey", [0, 1, 127, 254, 255])
def test_a_blank_picture_holds_nothing(grey: int) -> None:
    assert detect(np.full((64, 64, 3), grey, dtype=np.uint8)) == []


@pytest.mark.parametrize("kind", ["uniform", "normal", "grey", "salt"])
def test_noise_holds_nothing(kind: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        noise = {
            "uniform": lambda: rng.random((64, 64, 3)),
            "normal": lambda: 0.5 + rng.normal(size=(64, 64, 3)),
            "grey": lambda: rng.random((64, 64, 1)).repeat(3, -1),
            "salt": lambda: (rng.random((64, 64, 3)) < 0.05).astype(float),
        }[kind]()
        assert detect(noise) == []


def test_specks_and_squashed_and_ragged_pieces_are_no_objects() -> None:
    red = np.array(COLOURS["red"], dtype=np.uint8)
    for top, bottom, left, right in ((10, 14, 10, 14), (10, 50, 10, 20), (10, 16, 5, 60)):
        image = np.full((64, 64, 3), 120, dtype=np.uint8)
        image[top:bottom, left:right] = red
        assert detect(image) == []
    rng = np.random.default_rng(0)
    image = np.full((64, 64, 3), 120, dtype=np.uint8)
    image[10:54, 10:54][rng.random((44, 44)) < 0.6] = red
    assert detect(image) == []


def test_floats_and_bytes_give_the_same() -> None:
    for image in pictures(30):
        expected = detect(image)
        assert expected
        for dtype in (np.float32, np.float64):
            assert detect((image / 255.0).astype(dtype)) == expected
        assert summary(detect((image / 255.0).astype(np.float16))) == summary(expected)


def test_values_outside_of_the_range_are_clipped() -> None:
    image = np.full((64, 64, 3), 0.9)
    # A decoder's overshoot: white to the eye, a strong blue by the numbers.
    image[20:44, 20:44] = (1.0, 1.0, 1.5)
    assert detect(image) == []
    image[20:44, 20:44] = (1.5, -0.5, -0.5)
    assert summary(detect(image)) == [("square", "red")]


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_a_larger_picture_gives_the_same_objects_in_larger_boxes(factor: int) -> None:
    for image in pictures(6):
        small, large = detect(image), detect(image.repeat(factor, 0).repeat(factor, 1))
        assert summary(large) == summary(small)
        for a, b in zip(small, large, strict=True):
            assert np.allclose(np.array(a.box) * factor, b.box)
            assert a.score == pytest.approx(b.score, abs=0.08)


@pytest.mark.parametrize("shape", [(64, 128), (200, 64), (40, 1), (1, 1), (1, 300)], ids=str)
def test_pictures_need_not_be_square(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 120, dtype=np.uint8)
    assert detect(image) == []
    if min(shape) == 64:
        image[:64, :64] = plain([SceneObject("triangle", "cyan", 30.0, 30.0, 12.0)])
        assert summary(detect(image)) == [("triangle", "cyan")]


def test_strided_and_read_only_pictures_are_taken() -> None:
    image = pictures(1)[0]
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    planes.setflags(write=False)
    assert detect(planes.transpose(1, 2, 0)) == detect(image)
    assert detect(np.asfortranarray(image)) == detect(image)
    before = image.copy()
    detect(image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("image", "kind", "words"),
    [
        (np.zeros((64, 64)), ValueError, r"expected shape \[H, W, 3\], got \[64, 64\]"),
        (np.zeros((64, 64, 4)), ValueError, r"got \[64, 64, 4\]"),
        (np.zeros((3, 64, 64)), ValueError, r"got \[3, 64, 64\]"),
        (np.zeros((1, 64, 64, 3)), ValueError, r"got \[1, 64, 64, 3\]"),
        (np.zeros((0, 64, 3)), ValueError, r"got \[0, 64, 3\]"),
        (np.full((8, 8, 3), np.nan), ValueError, "expected finite values, got NaN or infinity"),
        (np.full((8, 8, 3), np.inf), ValueError, "expected finite values"),
        (np.zeros((8, 8, 3), dtype=np.int64), TypeError, "expected uint8, or float .* got int64"),
        (np.zeros((8, 8, 3), dtype=bool), TypeError, "got bool"),
        (np.zeros((8, 8, 3), dtype=complex), TypeError, "got complex128"),
    ],
)
def test_what_is_no_picture_is_refused(image: np.ndarray, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=f"image: .*{words}"):
        detect(image)


def test_masks_are_the_pixels_of_their_objects() -> None:
    objects = [SceneObject("square", "red", 16.0, 20.0, 9.0), SceneObject("circle", "blue", 45.0, 44.0, 8.0)]
    found = detect_masks(plain(objects))
    assert [item for item, _ in found] == detect(plain(objects))
    for item, mask in found:
        (drawn,) = [each for each in objects if each.shape == item.name]
        truth = shape_mask(drawn.shape, drawn.x, drawn.y, drawn.radius) > 0.5
        assert mask.dtype == bool and (mask & truth).sum() / (mask | truth).sum() > 0.85
