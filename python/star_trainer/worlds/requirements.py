"""GenEval's requirement logic on detected objects: strict (all or nothing) and graded (the fraction that is met).

The rules are those of GenEval (Ghosh et al. 2023, arXiv 2310.11513): enough objects of each class, the
required colour on enough of them, every pair in the required relation, and not too many where a number
is asked for. Detections come from outside, so that the same logic serves every detector. What Flow-GRPO
trains on is another score of the same detections.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from star_trainer.prompts.prompt import required

POSITION_MARGIN = 0.1


@dataclass(frozen=True)
class DetectedObject:
    """One detection: class name, confidence, colour if known, box (left, top, right, bottom) in pixels."""

    name: str
    score: float
    colour: str | None
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Verdict:
    """`strict` is 1.0 when every requirement is met, else 0.0; `graded` is the fraction that is met.

    Where extra objects are punished `graded` can be below 1 for an image that meets everything.
    """

    strict: float
    graded: float
    unmet: tuple[str, ...]


def relative_positions(first: DetectedObject, second: DetectedObject) -> set[str]:
    """Relations in which `first` stands to `second`; empty when their centres are too close to tell.

    The offset of the centres is shortened by a margin of 0.1 of both boxes' extents; a direction counts when what
    is left of it makes up more than half of the centres' distance. Next to a corner, two directions can count.
    """
    a, b = np.array(first.box), np.array(second.box)
    extent = (a[2:] - a[:2]) + (b[2:] - b[:2])
    offset = (a[:2] + a[2:]) / 2 - (b[:2] + b[2:]) / 2
    clear = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_MARGIN * extent, 0.0)
    if (np.abs(clear) < 1e-3).all():
        return set()
    # Relative to the whole offset, not to what is left of it: boxes that mostly overlap stand in no relation.
    dx, dy = clear / np.hypot(*offset)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in named.items() if holds}


def check_requirements(
    metadata: Mapping[str, Any], classes: Collection[str] | None = None, colours: Collection[str] | None = None
) -> None:
    """Whether `judge` can tell images of a prompt apart by its metadata.

    `classes` and `colours` are all that the detector can see, where they are given.

    Raises:
        ValueError: nothing is required, a requirement is malformed, or cannot be seen; the message says what was
            expected.
    """
    include, exclude = required(metadata, "include"), required(metadata, "exclude")
    if not (include or exclude):
        raise ValueError("expected 'include', GenEval's list of the objects that an image must show")
    for index, requirement in enumerate([*include, *exclude]):
        count = requirement.get("count")
        wrong = not isinstance(requirement.get("class"), str) or isinstance(count, bool)
        if wrong or not isinstance(count, int) or count < 1:
            raise ValueError(f"expected an object with 'class' and a positive 'count', got {reprlib.repr(requirement)}")
        if not isinstance(requirement.get("color", ""), str):
            raise ValueError(f"expected the name of a colour, got {reprlib.repr(requirement['color'])}")
        if classes is not None and requirement["class"] not in classes:
            raise ValueError(f"expected a class that the detector knows, got {requirement['class']!r}")
        if colours is not None and "color" in requirement and requirement["color"] not in colours:
            raise ValueError(f"expected a colour among {', '.join(colours)}, got {requirement['color']!r}")
        if "position" in requirement and index < len(include):
            _check_position(requirement["position"], index)


def _check_position(position: Any, index: int) -> None:
    """A position is a relation and the place of an object further up in the list."""
    match position:
        case [("left of" | "right of" | "above" | "below"), int(target)] if 0 <= target < index:
            return
    raise ValueError(f"expected a position like ['left of', 0] to an object further up, got {reprlib.repr(position)}")


def _by_class(detections: Sequence[DetectedObject]) -> dict[str, list[DetectedObject]]:
    """The detections of each class, the most confident first."""
    by_class: dict[str, list[DetectedObject]] = {}
    for item in sorted(detections, key=lambda item: -item.score):
        by_class.setdefault(item.name, []).append(item)
    return by_class


def flow_grpo_score(detections: Sequence[DetectedObject], metadata: Mapping[str, Any]) -> float:
    """What Flow-GRPO's reward server gives an image in training (see docs/training.md): at most 1, below 0 with many
    extras.

    Every entry of `include` scores its count, 1 − |wanted − found|/wanted. Its colour, scored alike over the objects
    found, and its position are looked at only where exactly as many as wanted were found, and the position only where
    the colour is right; without the count both together score one 0. A wrong position is a 0 and a 1, both averaged
    in; one whose target did not match is a 0. The result is the mean of all these; `exclude` is not read.
    """
    by_class = _by_class(detections)
    scores: list[float] = []
    groups: list[list[DetectedObject] | None] = []
    for requirement in metadata.get("include", ()):
        count, found = requirement["count"], by_class.get(requirement["class"], [])
        scores.append(1.0 - abs(count - len(found)) / count)
        matched = len(found) == count
        if not matched and ("color" in requirement or "position" in requirement):
            scores.append(0.0)
        if matched and "color" in requirement:
            coloured = sum(item.colour == requirement["color"] for item in found)
            scores.append(1.0 - abs(count - coloured) / count)
            matched = coloured == count
        if matched and "position" in requirement:
            relation, target = requirement["position"]
            others = groups[target]
            matched = others is not None and all(relation in relative_positions(a, b) for a in found for b in others)
            if not matched:
                scores.append(0.0)
            if others is not None:
                scores.append(1.0)
        groups.append(found if matched else None)
    return sum(scores) / len(scores) if scores else 0.0


def judge(detections: Sequence[DetectedObject], metadata: Mapping[str, Any], *, punish_extras: bool = False) -> Verdict:
    """Compare detections with a prompt's `include` and `exclude` requirements.

    Of each class the most confident detections are taken, as many as are required. Graded credit: a
    requirement is split into its parts (count, colour, position, not too many), each worth the same; a
    count that is not reached is credited with the share that was found. With `punish_extras` every object
    beyond the count takes as much from that credit as one that is missing, down to 0; the strict verdict,
    GenEval's, stays.
    """
    by_class = _by_class(detections)
    credits: list[float] = []
    unmet: list[str] = []
    groups: list[list[DetectedObject] | None] = []

    def score(met: bool, credit: float, complaint: str) -> None:
        credits.append(1.0 if met else credit)
        if not met:
            unmet.append(complaint)

    for requirement in required(metadata, "include"):
        name, count = requirement["class"], requirement["count"]
        everything = by_class.get(name, [])
        found = everything[:count]
        matched = len(found) == count
        score(matched, len(found) / count, f"expected {name}>={count}, found {len(found)}")
        if punish_extras and matched:
            credits[-1] = max(0.0, 1.0 - (len(everything) - count) / count)
        if "color" in requirement:
            coloured = sum(item.colour == requirement["color"] for item in found)
            right = matched and coloured == count
            # Every part is scored, so that the best graded value is 1 whatever was found.
            score(right, coloured / count, f"expected {requirement['color']} {name}>={count}, found {coloured}")
            matched = right
        if "position" in requirement:
            relation, target = requirement["position"]
            others = groups[target]
            holds = matched and others is not None
            if holds:
                holds = all(relation in relative_positions(a, b) for a in found for b in others or ())
            score(holds, 0.0, f"expected {name} {relation} target")
            matched = matched and holds
        groups.append(found if matched else None)
    for requirement in required(metadata, "exclude"):
        name, count = requirement["class"], requirement["count"]
        number = len(by_class.get(name, []))
        score(number < count, 0.0, f"expected {name}<{count}, found {number}")

    graded = float(np.mean(credits)) if credits else 1.0
    return Verdict(1.0 if not unmet else 0.0, graded, tuple(unmet))
