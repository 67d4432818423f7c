"""Prompts of the scenes world, in GenEval's categories, with metadata in its include/exclude format.

The class of an object is its shape.

Everything is a pure function of a numpy generator. A prompt is held out when its hash says so: the
split is the same for whoever trains the base model and whoever post-trains it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from star_trainer.prompts import Prompt

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (222, 38, 38),
    "yellow": (238, 216, 40),
    "green": (42, 176, 62),
    "cyan": (44, 204, 216),
    "blue": (44, 72, 226),
    "purple": (176, 48, 208),
}
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBER_WORDS = {2: "two", 3: "three"}
HELD_OUT_FRACTION = 0.2

# Chosen so that every category, also those of few prompts, has some on either side of the split.
_SPLIT_SALT = "scenes-18"
_CATEGORY_SHARES = (0.06, 0.14, 0.2, 0.1, 0.25, 0.25)


def is_held_out(text: str) -> bool:
    """Whether a prompt belongs to the evaluation split, by a hash of its text."""
    digest = hashlib.sha256(f"{_SPLIT_SALT}:{text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_FRACTION


def _indefinite(phrase: str) -> str:
    return f"a {phrase}"


def pick(rng: np.random.Generator, choices: Sequence[str], count: int = 1) -> list[str]:
    """`count` different ones of `choices`."""
    return [choices[index] for index in rng.permutation(len(choices))[:count]]


def sample_prompt(rng: np.random.Generator, category: str | None = None) -> Prompt:
    """Draw a prompt of `category`, or of a category drawn by its share."""
    if category is None:
        category = CATEGORIES[rng.choice(len(CATEGORIES), p=_CATEGORY_SHARES)]
    colours = tuple(COLOURS)
    include: list[dict[str, Any]]
    exclude: list[dict[str, Any]] = []
    if category in ("single_object", "colors"):
        shape = pick(rng, SHAPES)[0]
        include = [{"class": shape, "count": 1}]
        phrases = [shape]
        if category == "colors":
            include[0]["color"] = pick(rng, colours)[0]
            phrases = [f"{include[0]['color']} {shape}"]
        text = _indefinite(phrases[0])
    elif category == "counting":
        shape, count = pick(rng, SHAPES)[0], int(rng.integers(2, 4))
        plural = "crosses" if shape == "cross" else f"{shape}s"
        include = [{"class": shape, "count": count}]
        exclude = [{"class": shape, "count": count + 1}]
        if rng.random() < 0.7:
            include[0]["color"] = pick(rng, colours)[0]
            plural = f"{include[0]['color']} {plural}"
        phrases = [f"{NUMBER_WORDS[count]} {plural}"]
        text = phrases[0]
    elif category in ("two_object", "color_attr", "position"):
        pair = pick(rng, SHAPES, 2)
        include = [{"class": shape, "count": 1} for shape in pair]
        phrases = list(pair)
        if category == "color_attr" or (category == "position" and rng.random() < 0.7):
            hues = pick(rng, colours, 2)
            for requirement, hue in zip(include, hues, strict=True):
                requirement["color"] = hue
            phrases = [f"{hue} {shape}" for hue, shape in zip(hues, pair, strict=True)]
        if category == "position":
            relation = pick(rng, RELATIONS)[0]
            # The first object named is the one that stands in a relation to the second, as in GenEval.
            text = f"{_indefinite(phrases[0])} {relation} {_indefinite(phrases[1])}"
            include = [include[1], {**include[0], "position": [relation, 0]}]
        else:
            text = f"{_indefinite(phrases[0])} and {_indefinite(phrases[1])}"
    else:
        raise ValueError(f"category: expected one of {', '.join(CATEGORIES)}, got {category!r}")
    text = f"a photo of {text}"
    metadata: dict[str, Any] = {"tag": category, "include": include, "prompt": text}
    if exclude:
        metadata["exclude"] = exclude
    return Prompt(text, metadata, tuple(phrases))


def sample_prompts(rng: np.random.Generator, count: int, *, held_out: bool, distinct: bool = False) -> list[Prompt]:
    """Draw `count` prompts of one split, categories by their shares; with `distinct` no text comes twice.

    A category whose prompts are used up (there are only four single objects) gives way to the others.

    Raises:
        ValueError: `distinct` asks for more prompts than the split is found to hold.
    """
    prompts: list[Prompt] = []
    seen: set[str] = set()
    shares = np.array(_CATEGORY_SHARES)
    while len(prompts) < count:
        if not shares.any():
            raise ValueError(f"count: found only {len(prompts)} distinct prompts of this split, asked for {count}")
        category = int(rng.choice(len(CATEGORIES), p=shares / shares.sum()))
        for _ in range(300):
            prompt = sample_prompt(rng, CATEGORIES[category])
            if is_held_out(prompt.text) == held_out and not (distinct and prompt.text in seen):
                seen.add(prompt.text)
                prompts.append(prompt)
                break
        else:
            shares[category] = 0.0
    return prompts
