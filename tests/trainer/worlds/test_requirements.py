"""GenEval's requirement logic, on detections made by hand and on the real metadata."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from star_trainer.worlds.requirements import DetectedObject, Verdict, flow_grpo_score, judge, relative_positions

GENEVAL = Path(__file__).parents[4] / "shared" / "data" / "geneval_metadata.jsonl"
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def seen(
    name: str, colour: str | None = None, at: tuple[float, float] = (32.0, 32.0), score: float = 0.9, size: float = 10.0
) -> DetectedObject:
    """A detection with a square box of `size` around `at`."""
    x, y, half = *at, size / 2
    return DetectedObject(name, score, colour, (x - half, y - half, x + half, y + half))


def needs(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def test_nothing_required_is_met_by_anything() -> None:
    for metadata in ({}, {"include": [], "exclude": []}):
        assert judge([], metadata) == judge([seen("cat")], metadata) == Verdict(1.0, 1.0, ())


def test_one_object_is_found_or_not() -> None:
    metadata = {"include": [needs("cat")]}
    assert judge([seen("cat")], metadata) == Verdict(1.0, 1.0, ())
    assert judge([seen("dog"), seen("cat")], metadata).strict == 1.0
    verdict = judge([seen("dog")], metadata)
    assert verdict == Verdict(0.0, 0.0, ("expected cat>=1, found 0",))


@pytest.mark.parametrize(("found", "graded"), [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (5, 1.0)])
def test_a_count_that_is_not_reached_has_credit_for_what_was_found(found: int, graded: float) -> None:
    verdict = judge([seen("cat")] * found, {"include": [needs("cat", 3)]})
    assert verdict.strict == float(found >= 3)
    assert verdict.graded == pytest.approx(graded)


@pytest.mark.parametrize(("found", "strict", "graded"), [(1, 0.0, 0.75), (2, 1.0, 1.0), (3, 0.0, 0.5), (4, 0.0, 0.5)])
def test_too_many_are_excluded(found: int, strict: float, graded: float) -> None:
    verdict = judge([seen("cat")] * found, {"include": [needs("cat", 2)], "exclude": [needs("cat", 3)]})
    assert (verdict.strict, verdict.graded) == (strict, pytest.approx(graded))
    if found > 2:
        assert verdict.unmet == (f"expected cat<3, found {found}",)


def test_an_excluded_class_must_not_be_there() -> None:
    metadata = {"include": [needs("cat")], "exclude": [needs("dog")]}
    assert judge([seen("cat")], metadata).strict == 1.0
    assert judge([seen("cat"), seen("dog")], metadata) == Verdict(0.0, 0.5, ("expected dog<1, found 1",))


def test_the_colour_must_be_right() -> None:
    metadata = {"include": [needs("cat", color="red")]}
    assert judge([seen("cat", "red")], metadata) == Verdict(1.0, 1.0, ())
    for wrong in ("blue", None):
        assert judge([seen("cat", wrong)], metadata) == Verdict(0.0, 0.5, ("expected red cat>=1, found 0",))
    assert judge([seen("dog", "red")], metadata).graded == 0.0


def test_every_counted_object_must_have_the_colour() -> None:
    metadata = {"include": [needs("cat", 2, color="red")]}
    assert judge([seen("cat", "red")] * 2, metadata).strict == 1.0
    verdict = judge([seen("cat", "red"), seen("cat", "blue")], metadata)
    assert (verdict.strict, verdict.graded) == (0.0, 0.75)
    one = judge([seen("cat", "red")], metadata)
    assert (one.strict, one.graded) == (0.0, 0.5)
    assert len(one.unmet) == 2


def test_the_most_confident_detections_are_the_ones_that_count() -> None:
    metadata = {"include": [needs("cat", color="red")]}
    sure_red = [seen("cat", "blue", score=0.7), seen("cat", "red", score=0.9)]
    sure_blue = [seen("cat", "blue", score=0.9), seen("cat", "red", score=0.7)]
    assert judge(sure_red, metadata).strict == judge(sure_red[::-1], metadata).strict == 1.0
    assert judge(sure_blue, metadata).strict == judge(sure_blue[::-1], metadata).strict == 0.0


def test_colours_belong_to_their_objects() -> None:
    metadata = {"include": [needs("cat", color="red"), needs("dog", color="blue")]}
    assert judge([seen("cat", "red"), seen("dog", "blue")], metadata).strict == 1.0
    swapped = judge([seen("cat", "blue"), seen("dog", "red")], metadata)
    assert (swapped.strict, swapped.graded) == (0.0, 0.5)


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_position_must_be_right(relation: str) -> None:
    metadata = {"include": [needs("dog"), needs("cat", position=[relation, 0])]}
    dx, dy = RELATIONS[relation]
    assert judge([seen("dog"), seen("cat", at=(32 + 20 * dx, 32 + 20 * dy))], metadata) == Verdict(1.0, 1.0, ())
    for other, (dx, dy) in RELATIONS.items():
        if other != relation:
            verdict = judge([seen("dog"), seen("cat", at=(32 + 20 * dx, 32 + 20 * dy))], metadata)
            assert (verdict.strict, verdict.graded) == (0.0, pytest.approx(2 / 3))
            assert verdict.unmet == (f"expected cat {relation} target",)


def test_a_position_that_is_not_clear_is_not_met() -> None:
    metadata = {"include": [needs("dog"), needs("cat", position=["left of", 0])]}
    assert judge([seen("dog"), seen("cat", at=(31.0, 32.0))], metadata).strict == 0.0
    assert judge([seen("dog"), seen("cat")], metadata).strict == 0.0


@pytest.mark.parametrize("dogs", [[], [seen("dog", "blue", at=(52.0, 32.0))]], ids=["missing", "of the wrong colour"])
def test_a_position_needs_its_target(dogs: list[DetectedObject]) -> None:
    metadata = {"include": [needs("dog", color="red"), needs("cat", position=["left of", 0])]}
    verdict = judge([seen("cat"), *dogs], metadata)
    assert verdict.strict == 0.0
    # Four parts: the dog, its colour, the cat, the position.
    assert verdict.graded == pytest.approx((1 + len(dogs)) / 4)


def test_a_position_needs_its_own_object_in_the_right_colour() -> None:
    metadata = {"include": [needs("dog"), needs("cat", color="red", position=["left of", 0])]}
    dog = seen("dog", at=(52.0, 32.0))
    assert judge([dog, seen("cat", "red")], metadata).strict == 1.0
    assert judge([dog, seen("cat", "blue")], metadata).graded == pytest.approx(2 / 4)
    assert judge([dog], metadata).graded == pytest.approx(1 / 4)


def test_every_pair_must_be_in_the_relation() -> None:
    metadata = {"include": [needs("dog", 2), needs("cat", position=["left of", 0])]}
    near, far = seen("dog", at=(42.0, 32.0)), seen("dog", at=(60.0, 32.0))
    assert judge([near, far, seen("cat", at=(20.0, 32.0))], metadata).strict == 1.0
    assert judge([near, far, seen("cat", at=(51.0, 32.0))], metadata).strict == 0.0


def test_a_chain_breaks_where_a_link_is_missing() -> None:
    metadata = {"include": [needs("dog"), needs("cat", position=["left of", 0]), needs("cow", position=["left of", 1])]}
    places = [seen("dog", at=(60.0, 32.0)), seen("cat", at=(40.0, 32.0)), seen("cow", at=(20.0, 32.0))]
    assert judge(places, metadata).strict == 1.0
    wrong = [places[0], seen("cat", at=(60.0, 50.0)), places[2]]
    assert judge(wrong, metadata).graded == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((10.0, 0.0), {"right of"}),
        ((-10.0, 0.0), {"left of"}),
        ((0.0, 10.0), {"below"}),
        ((0.0, -10.0), {"above"}),
        ((10.0, 3.0), {"right of"}),
        ((10.0, 10.0), {"right of", "below"}),
        ((-10.0, 10.0), {"left of", "below"}),
        # Boxes of 10 pixels: 2 pixels of an offset do not count, and what is left must be more than half of it.
        ((4.1, 0.0), {"right of"}),
        ((3.9, 0.0), set()),
        ((0.0, -3.9), set()),
        ((2.0, 0.0), set()),
        ((0.0, 0.0), set()),
        ((6.7, 6.7), set()),
        ((7.0, 7.0), {"right of", "below"}),
        ((10.0, 20.0), {"below"}),
    ],
)
def test_relations_of_two_boxes(offset: tuple[float, float], expected: set[str]) -> None:
    first, second = seen("a", at=(32.0 + offset[0], 32.0 + offset[1])), seen("b")
    assert relative_positions(first, second) == expected
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relative_positions(second, first) == {opposite[relation] for relation in expected}


def test_large_boxes_need_more_distance() -> None:
    offset = (37.0, 32.0)
    assert relative_positions(seen("a", at=offset), seen("b")) == {"right of"}
    assert relative_positions(seen("a", at=offset, size=40.0), seen("b", size=40.0)) == set()


@pytest.mark.parametrize(("found", "graded"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5), (4, 0.0), (7, 0.0)])
def test_extra_objects_cost_credit_where_they_are_punished(found: int, graded: float) -> None:
    objects, metadata = [seen("cat", "red")] * found, {"include": [needs("cat", 2)]}
    assert judge(objects, metadata, punish_extras=True).graded == graded
    # Only the grade: what GenEval decides, and what is credited for the colour, stay.
    assert judge(objects, metadata, punish_extras=True).strict == judge(objects, metadata).strict
    coloured = {"include": [needs("cat", 2, color="red")]}
    assert judge(objects, coloured, punish_extras=True).graded == (graded + min(found, 2) / 2) / 2


BOWL, GLASS = [needs("bowl")], [needs("wine glass", 2)]
CLOCKS, RED_CAR = [needs("clock", 4)], [needs("car", color="red")]
THREE_RED_CARS = [needs("car", 3, color="red")]
PAIR = [needs("bench"), needs("dog")]
TWO_COLOURS = [needs("car", color="red"), needs("dog", color="blue")]
LEFT = [needs("dog"), needs("cat", position=["left of", 0])]
RED_LEFT = [needs("dog"), needs("cat", color="red", position=["left of", 0])]
LEFT_OF_RED = [needs("dog", color="red"), needs("cat", position=["left of", 0])]
CHAIN = [*LEFT, needs("cow", position=["left of", 1])]
THERE, FAR_LEFT, RIGHT = (60.0, 32.0), (20.0, 32.0), (90.0, 32.0)
DOG, CAT, WRONG_CAT = seen("dog", at=THERE), seen("cat", at=FAR_LEFT), seen("cat", at=RIGHT)


@pytest.mark.parametrize(
    ("include", "found", "value"),
    [
        # One part each: the count, 1 - |wanted - found| / wanted.
        (BOWL, [], 0.0),
        (BOWL, [seen("bowl")], 1.0),
        (BOWL, [seen("cup")], 0.0),
        (BOWL, [seen("bowl"), seen("cup")], 1.0),
        (BOWL, [seen("bowl")] * 2, 0.0),
        (BOWL, [seen("bowl")] * 3, -1.0),
        (BOWL, [seen("bowl")] * 16, -14.0),
        (GLASS, [], 0.0),
        (GLASS, [seen("wine glass")], 0.5),
        (GLASS, [seen("wine glass")] * 2, 1.0),
        (GLASS, [seen("wine glass")] * 3, 0.5),
        (GLASS, [seen("wine glass")] * 4, 0.0),
        (CLOCKS, [seen("clock")] * 3, 0.75),
        (CLOCKS, [seen("clock")] * 6, 0.5),
        (PAIR, [seen("bench")], 0.5),
        (PAIR, [seen("bench"), seen("dog"), seen("dog")], 0.5),
        (PAIR, [seen("bench")] * 3 + [seen("dog")], 0.0),
        # Count and colour: without the count the colour is worth 0, whatever it is.
        (RED_CAR, [], 0.0),
        (RED_CAR, [seen("car", "red")], 1.0),
        (RED_CAR, [seen("car", "blue")], 0.5),
        (RED_CAR, [seen("car", "red")] * 2, 0.0),
        (RED_CAR, [seen("car", "red")] * 3, -0.5),
        (THREE_RED_CARS, [seen("car", "red")] * 3, 1.0),
        (THREE_RED_CARS, [seen("car", "red")] * 2 + [seen("car", "blue")], 5 / 6),
        (THREE_RED_CARS, [seen("car", "red")] * 2, 1 / 3),
        (TWO_COLOURS, [seen("car", "red"), seen("dog", "blue")], 1.0),
        (TWO_COLOURS, [seen("car", "blue"), seen("dog", "red")], 0.5),
        (TWO_COLOURS, [seen("car", "red")], 0.5),
        # Positions: three parts where right, four where wrong, a 0 and a 1 among them.
        (LEFT, [DOG, CAT], 1.0),
        (LEFT, [DOG, WRONG_CAT], 3 / 4),
        (LEFT, [DOG], 1 / 3),
        (LEFT, [DOG, CAT, CAT], 1 / 3),
        (LEFT, [CAT], 1 / 3),
        (LEFT, [DOG, DOG, CAT], 1 / 3),
        (LEFT, [], 0.0),
        # Without its count, one 0 for both colour and position; in the wrong colour, no position.
        (RED_LEFT, [DOG, seen("cat", "red", at=FAR_LEFT)], 1.0),
        (RED_LEFT, [DOG, seen("cat", "red", at=RIGHT)], 4 / 5),
        (RED_LEFT, [DOG, seen("cat", "blue", at=FAR_LEFT)], 2 / 3),
        (RED_LEFT, [DOG], 1 / 3),
        # A target in the wrong colour is none.
        (LEFT_OF_RED, [seen("dog", "blue", at=THERE), CAT], 2 / 4),
        (CHAIN, [seen("dog", at=RIGHT), seen("cat", at=THERE), seen("cow", at=FAR_LEFT)], 1.0),
        (CHAIN, [DOG, WRONG_CAT, seen("cow", at=FAR_LEFT)], 4 / 6),
    ],
)
def test_flow_grpos_score_has_the_values_worked_out_by_hand(
    include: list[dict[str, Any]], found: list[DetectedObject], value: float
) -> None:
    assert flow_grpo_score(found, {"include": include}) == pytest.approx(value)
    # What must not be there is not looked at.
    assert flow_grpo_score(found, {"include": include, "exclude": [needs("bowl")]}) == pytest.approx(value)


def perfect(metadata: dict[str, Any]) -> list[DetectedObject]:
    """Detections that meet the include requirements, each group at its own place."""
    places: list[tuple[float, float]] = []
    found = []
    for index, requirement in enumerate(metadata["include"]):
        place = (200.0 + 1000.0 * index, 200.0)
        if "position" in requirement:
            relation, target = requirement["position"]
            dx, dy = RELATIONS[relation]
            place = (places[target][0] + 100.0 * dx, places[target][1] + 100.0 * dy)
        places.append(place)
        found += [seen(requirement["class"], requirement.get("color"), at=place)] * requirement["count"]
    return found


@pytest.mark.skipif(not GENEVAL.exists(), reason="the public data folder is not there")
def test_all_prompts_of_geneval_are_judged() -> None:
    lines = [json.loads(line) for line in GENEVAL.read_text().splitlines()]
    assert len(lines) == 553
    for metadata in lines:
        found = perfect(metadata)
        assert judge(found, metadata) == Verdict(1.0, 1.0, ()), metadata["prompt"]
        empty = judge([], metadata)
        # With nothing in the picture there are not too many of anything either; that is all that is met.
        assert (empty.strict, empty.graded) == (0.0, 0.5 if "exclude" in metadata else 0.0), metadata["prompt"]
        assert judge(found[:-1], metadata).strict == 0.0
        grey = [replace(item, colour="grey") for item in found]
        coloured = any("color" in requirement for requirement in metadata["include"])
        assert judge(grey, metadata).strict == float(not coloured)
        for excluded in metadata.get("exclude", ()):
            assert judge(found + [seen(excluded["class"])] * excluded["count"], metadata).strict == 0.0
        if metadata["tag"] == "position":
            turned = [replace(item, box=tuple(-side for side in item.box[2:] + item.box[:2])) for item in found]
            assert judge(turned, metadata).strict == 0.0
    assert Counter(metadata["tag"] for metadata in lines)["position"] == 100
