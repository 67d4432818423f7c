"""GenEval's reward: its detector on real classes with random weights, its thresholds, and its published decisions."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from star_trainer.config import ConfigError, Reward
from star_trainer.prompts import Prompt
from star_trainer.rewards import geneval
from star_trainer.rewards.geneval import Detector, box_of, masked_crop
from star_trainer.rewards.geneval_classes import CLASSES, COLOURS
from star_trainer.rewards.models import clip
from star_trainer.rewards.terms import load_terms, unsuitable
from star_trainer.worlds.requirements import DetectedObject, flow_grpo_score, judge

from tests.tiny_models import DATA
from tests.tiny_reward_models import COCO, save_clip, save_detector

RGB = {
    "red": (220, 20, 20),
    "blue": (20, 20, 220),
    "green": (20, 160, 20),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
}


class SeesColours:
    """In CLIP's place: one axis per colour, an image's coordinates are the numbers of pixels near each colour."""

    device = torch.device("cpu")

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(colour in text) for colour in COLOURS] for text in texts])

    def embed_images(self, images: np.ndarray) -> torch.Tensor:
        rows = []
        for image in images:
            counts = [float((np.abs(image - np.array(RGB.get(c, (999,) * 3))).sum(-1) < 60).sum()) for c in COLOURS]
            rows.append(counts)
        return torch.tensor(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_detector(tmp_path_factory.mktemp("detector") / "model"))


@pytest.fixture(scope="module")
def detector(folder: str) -> Detector:
    return Detector(folder, SeesColours())  # type: ignore[arg-type]


def test_instances_have_names_scores_and_masks_of_the_images_size(detector: Detector) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    (found,) = detector.instances(image[None], [0.0])
    assert found
    for name, score, mask in found:
        assert name in CLASSES and 0.0 < score < 1.0
        assert mask.shape == (48, 80) and mask.dtype == bool and mask.any()
    assert list(detector.instances(image[None], [0.999])) == [[]]


def mask(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    covered = np.zeros((60, 60), dtype=bool)
    covered[top:bottom, left:right] = True
    return covered


@pytest.fixture
def given(detector: Detector, monkeypatch: pytest.MonkeyPatch):
    """Make the detector see what a test says."""

    def see(*instances: tuple[str, float, np.ndarray]) -> Detector:
        monkeypatch.setattr(
            detector, "instances", lambda images, least: [[i for i in instances if i[1] > value] for value in least]
        )
        return detector

    return see


def picture(**regions: tuple[int, int, int, int]) -> np.ndarray:
    image = np.full((60, 60, 3), 250, dtype=np.uint8)
    for colour, (left, top, right, bottom) in regions.items():
        image[top:bottom, left:right] = RGB[colour]
    return image


def test_counting_asks_for_more_confidence(given) -> None:
    detector = given(*[("cat", score, mask(0, 0, 5, 5)) for score in (0.95, 0.8, 0.2)])
    found = detector(np.stack([picture()] * 2), [{"tag": "counting"}, {"tag": "single_object"}])
    assert [len(objects) for objects in found] == [1, 2]


def test_at_most_sixteen_objects_of_a_class_count(given) -> None:
    detector = given(*[("cat", 0.5 + i / 100, mask(0, 0, 5, 5)) for i in range(20)], ("tv", 0.4, mask(0, 0, 5, 5)))
    (found,) = detector(picture()[None], [{}])
    scores = [item.score for item in found if item.name == "cat"]
    assert len(scores) == 16 and scores == sorted(scores, reverse=True) and max(scores) == 0.69
    assert sum(item.name == "tv" for item in found) == 1


def test_colours_are_those_of_the_object_and_not_of_what_is_around_it(given) -> None:
    image = picture(blue=(10, 10, 30, 30), red=(10, 10, 20, 30))
    # The mask is the blue half; in its bounding box with the rest of the image, red would be as frequent.
    detector = given(("cat", 0.9, mask(20, 10, 30, 30)), ("tv", 0.9, mask(10, 10, 20, 30)))
    metadata = {"include": [{"class": "cat", "count": 1, "color": "blue"}, {"class": "tv", "count": 1}]}
    found = {item.name: item for item in detector(image[None], [metadata])[0]}
    assert found["cat"].colour == "blue" and found["cat"].box == (20.0, 10.0, 30.0, 30.0)
    # No colour is looked for where none is asked for.
    assert found["tv"].colour is None


@pytest.mark.parametrize(
    ("cats", "asked", "values"),
    [
        (1, "blue", {"strict": 1.0, "graded": 1.0, "graded, extras ignored": 1.0, "flow_grpo": 1.0}),
        (1, "red", {"strict": 0.0, "graded": 0.5, "graded, extras ignored": 0.5, "flow_grpo": 0.5}),
        (3, "blue", {"strict": 1.0, "graded": 0.5, "graded, extras ignored": 1.0, "flow_grpo": -0.5}),
    ],
)
def test_each_reward_is_its_score_of_what_was_seen(
    given, monkeypatch: pytest.MonkeyPatch, cats: int, asked: str, values: dict[str, float]
) -> None:
    detector = given(*[("cat", 0.9, mask(10, 10, 30, 30))] * cats)
    monkeypatch.setattr("star_trainer.rewards.named.Models.detector", detector)
    metadata = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": asked}]}
    images, prompts = picture(blue=(10, 10, 30, 30))[None].repeat(2, 0), [Prompt("x", metadata)] * 2
    for name, value in values.items():
        term, _, ignored = name.partition(", ")
        config = Reward(terms={f"geneval_{term}": 1.0}, extra_objects="ignored" if ignored else "punished")
        (reward,) = load_terms(config).values()
        assert reward(images, prompts).tolist() == [value] * 2, name


def test_images_and_crops_share_passes_and_give_what_each_gives_alone(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(folder, clip.ClipModel(str(save_clip(tmp_path)), key="clip"))
    passes: list[list[int]] = [[], []]
    for sizes, model in zip(passes, (detector.model, detector.clip.model.vision_model), strict=True):
        model.register_forward_pre_hook(
            lambda _, args, given, s=sizes: s.append(len(given["pixel_values"])), with_kwargs=True
        )
    monkeypatch.setattr(geneval, "_AT_ONCE", 2)
    monkeypatch.setattr(clip, "AT_ONCE", 7)
    # Random weights are sure of nothing; half of what they see is above the second threshold.
    monkeypatch.setattr(geneval, "THRESHOLD", 0.0)
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 80, 3), dtype=np.uint8)
    scores = sorted(score for found in detector.instances(images, [0.0] * 5) for _, score, _ in found)
    monkeypatch.setattr(geneval, "COUNTING_THRESHOLD", scores[len(scores) // 2])
    include = [{"class": name, "count": 1, "color": "red"} for name in CLASSES[::2]]
    metadata = [{"tag": "counting" if i % 3 else "colors", "include": include} for i in range(5)]
    alone = [detector(images[i : i + 1], metadata[i : i + 1])[0] for i in range(5)]
    for sizes in passes:
        sizes.clear()
    together = detector(images, metadata)
    coloured = sum(item.colour is not None for objects in together for item in objects)
    assert passes == [[2, 2, 1], [7] * (coloured // 7) + [coloured % 7] * (coloured % 7 > 0)]
    assert len({item.colour for objects in together for item in objects} - {None}) > 1
    assert coloured > 7 and any(item.colour is None for objects in together for item in objects)
    for objects, expected in zip(together, alone, strict=True):
        assert [(item.name, item.colour, item.box) for item in objects] == [
            (item.name, item.colour, item.box) for item in expected
        ]
        assert [item.score for item in objects] == pytest.approx([item.score for item in expected], rel=1e-4)


def test_boxes_and_crops_of_masks() -> None:
    assert box_of(mask(3, 4, 9, 6)) == (3.0, 4.0, 9.0, 6.0)
    covered = mask(0, 0, 4, 4)
    covered[1, 1] = False
    crop = masked_crop(picture(red=(0, 0, 60, 60)), covered)
    assert crop.shape == (4, 4, 3) and tuple(crop[1, 1]) == (153, 153, 153) and tuple(crop[0, 0]) == RGB["red"]


def test_a_detector_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"reward.models.detector: {tmp_path}"):
        Detector(str(tmp_path), SeesColours())  # type: ignore[arg-type]


OLDER = {
    **{"couch": "sofa", "potted plant": "pottedplant", "dining table": "diningtable", "tv": "tvmonitor"},
    **{"motorcycle": "motorbike", "airplane": "aeroplane", "traffic light": "Traffic_Light"},
}


def test_classes_are_known_by_their_older_names(tmp_path: Path) -> None:
    older = save_detector(tmp_path, [OLDER.get(name, name) for name in COCO])
    names = Detector(str(older), SeesColours()).names  # type: ignore[arg-type]
    assert names == dict(enumerate(CLASSES))


def test_a_detector_without_a_class_of_geneval_is_refused_by_the_class(tmp_path: Path) -> None:
    folder = save_detector(tmp_path, [name.replace("couch", "settee") for name in COCO])
    with pytest.raises(ConfigError, match=r"reward\.models\.detector: .*80 classes of GenEval, 1 .*: couch"):
        Detector(str(folder), SeesColours())  # type: ignore[arg-type]


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.models\.detector: .*type mask2former, got clip"):
        Detector(str(save_clip(tmp_path)), SeesColours())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("term", "entry", "reason"),
    [
        ("geneval_graded", {"class": "couch", "color": "red"}, None),
        ("geneval_graded", {"class": "sofa"}, "'sofa'"),
        ("geneval_strict", {"class": "couch", "color": "grey"}, "'grey'"),
    ],
)
def test_a_prompt_that_asks_for_what_no_detection_is_called_is_refused(
    term: str, entry: dict[str, Any], reason: str | None
) -> None:
    found = unsuitable(term, Prompt("x", {"include": [{"count": 1, **entry}]}))
    assert found is None if reason is None else found is not None and reason in found


def published_decision(found: list[DetectedObject], metadata: dict[str, Any]) -> bool:
    """What GenEval's evaluation decides, said once more and without the library: correct or not."""
    objects: dict[str, list[DetectedObject]] = {}
    for item in sorted(found, key=lambda item: -item.score):
        objects.setdefault(item.name, []).append(item)
    correct, groups = True, []
    for requirement in metadata.get("include", []):
        chosen = objects.get(requirement["class"], [])[: requirement["count"]]
        matched = len(chosen) >= requirement["count"]
        if matched and "color" in requirement:
            matched = sum(item.colour == requirement["color"] for item in chosen) >= requirement["count"]
        if matched and "position" in requirement:
            wanted, target = requirement["position"]
            if groups[target] is None:
                matched = False
            else:
                for item in chosen:
                    for other in groups[target]:
                        matched = matched and wanted in published_relations(item, other)
        correct = correct and matched
        groups.append(chosen if matched else None)
    for requirement in metadata.get("exclude", []):
        correct = correct and len(objects.get(requirement["class"], [])) < requirement["count"]
    return correct


def published_training_score(found: list[DetectedObject], metadata: dict[str, Any]) -> float:
    """What Flow-GRPO's reward server gives in training, said once more and without the library."""
    parts: list[Fraction] = []
    whole: list[bool] = []

    def exactness(wanted: int, number: int) -> bool:
        parts.append(1 - abs(Fraction(number - wanted, wanted)))
        return number == wanted

    for entry in metadata["include"]:
        same = [item for item in found if item.name == entry["class"]]
        if not exactness(entry["count"], len(same)):
            parts += [Fraction(0)] * bool({"color", "position"} & set(entry))
            whole.append(False)
            continue
        good = True
        if "color" in entry:
            good = exactness(entry["count"], [item.colour for item in same].count(entry["color"]))
        if good and "position" in entry:
            relation, target = entry["position"]
            good = whole[target]
            if good:
                name = metadata["include"][target]["class"]
                pairs = [(item, other) for item in same for other in found if other.name == name]
                good = all(relation in published_relations(*pair) for pair in pairs)
                parts.append(Fraction(1))
            parts += [Fraction(0)] * (not good)
        whole.append(good)
    return float(sum(parts) / len(parts))


def published_relations(a: DetectedObject, b: DetectedObject) -> set[str]:
    width = (a.box[2] - a.box[0]) + (b.box[2] - b.box[0])
    height = (a.box[3] - a.box[1]) + (b.box[3] - b.box[1])
    x = (a.box[0] + a.box[2]) / 2 - (b.box[0] + b.box[2]) / 2
    y = (a.box[1] + a.box[3]) / 2 - (b.box[1] + b.box[3]) / 2
    moved_x = max(abs(x) - 0.1 * width, 0.0) * (1 if x > 0 else -1)
    moved_y = max(abs(y) - 0.1 * height, 0.0) * (1 if y > 0 else -1)
    if abs(moved_x) < 1e-3 and abs(moved_y) < 1e-3:
        return set()
    length = (x * x + y * y) ** 0.5
    relations = set()
    if moved_x / length < -0.5:
        relations.add("left of")
    if moved_x / length > 0.5:
        relations.add("right of")
    if moved_y / length < -0.5:
        relations.add("above")
    if moved_y / length > 0.5:
        relations.add("below")
    return relations


def random_detections(generator: np.random.Generator, metadata: dict[str, Any]) -> list[DetectedObject]:
    """Objects of the prompt's classes and of another one, more or less as many as asked for, anywhere."""
    wanted = {entry["class"]: entry for entry in metadata["include"]}
    found = []
    for name in [*wanted, "zebra"]:
        entry = wanted.get(name, {"count": 0})
        # Mostly what is asked for, so that both decisions are frequent.
        count = entry["count"] if generator.random() < 0.7 else int(generator.integers(0, 6))
        for _ in range(count):
            colour = entry.get("color") if generator.random() < 0.8 else str(generator.choice(COLOURS))
            left, top = generator.uniform(0, 400, 2)
            width, height = generator.uniform(1, 150, 2)
            found.append(DetectedObject(name, generator.random(), colour, (left, top, left + width, top + height)))
    return [found[i] for i in generator.permutation(len(found))]


def test_decisions_and_training_scores_agree_with_the_published_ones() -> None:
    # The 2,212 prompts that Flow-GRPO tests on are these 553, four times each.
    path = DATA / "geneval_metadata.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    prompts = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(prompts) == 553
    generator = np.random.default_rng(0)
    decisions: dict[str, list[bool]] = {}
    scores: dict[str, set[float]] = {}
    for metadata in prompts:
        for _ in range(20):
            found = random_detections(generator, metadata)
            expected = published_decision(found, metadata)
            assert judge(found, metadata).strict == float(expected), (metadata, found)
            score = published_training_score(found, metadata)
            assert flow_grpo_score(found, metadata) == pytest.approx(score, abs=1e-12), (metadata, found)
            scores.setdefault(metadata["tag"], set()).add(round(score, 9))
            decisions.setdefault(metadata["tag"], []).append(expected)
    # Both decisions were met often, for every kind of prompt.
    assert all(0.05 < np.mean(made) < 0.95 for made in decisions.values())
    assert all(len(seen) > 5 for seen in scores.values())
