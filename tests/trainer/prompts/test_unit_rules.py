"""Text units by rule, on prompts of each kind and, where their files are, on the public ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from star_trainer.prompts.quotes import quoted_texts
from star_trainer.prompts.units.rules import noun_phrases, units_by_rule

from star_kernels import TextUnits
from star_kernels.text_units import stands_in
from tests.tiny_models import CLIP_MERGES, DATA, real_clip_tokenizer


def required(*objects: dict[str, Any]) -> dict[str, Any]:
    return {"include": [{"count": 1, **entry} for entry in objects]}


@pytest.mark.parametrize(
    ("prompt", "metadata", "units"),
    [
        ("a photo of a bench", required({"class": "bench"}), ["bench"]),
        ("a photo of two clocks", required({"class": "clock", "count": 2}), ["two clocks"]),
        ("a photo of four knives", required({"class": "knife", "count": 4}), ["four knives"]),
        ("a photo of three buses", required({"class": "bus", "count": 3}), ["three buses"]),
        ("a photo of a Blue Cow", required({"class": "cow", "color": "blue"}), ["Blue Cow"]),
        (
            "a photo of a purple wine glass and a black apple",
            required({"class": "wine glass", "color": "purple"}, {"class": "apple", "color": "black"}),
            ["purple wine glass", "black apple"],
        ),
        (
            "a photo of a dog right of a teddy bear",
            required({"class": "teddy bear"}, {"class": "dog", "position": ["right of", 0]}),
            ["teddy bear", "dog", "dog right of a teddy bear"],
        ),
        # The same class twice: each requirement has its own mention.
        (
            "a photo of a red cup and a blue cup",
            required({"class": "cup", "color": "red"}, {"class": "cup", "color": "blue"}),
            ["red cup", "blue cup"],
        ),
    ],
)
def test_required_objects_carry_their_count_colour_and_relation(
    prompt: str, metadata: dict[str, Any], units: list[str]
) -> None:
    assert units_by_rule(prompt, metadata) == units


@pytest.mark.parametrize(
    ("prompt", "units"),
    [
        ('A white card that reads "Password Is Coffee" next to a cup', ["Password Is Coffee", "white card"]),
        ('A 24-hour diner with a "Kitchen Closed" neon sign in the window', ["Kitchen Closed", "neon sign"]),
        ("the word 'START' on a coffee mug", ["START", "coffee mug"]),
        ("a book called ‘Don’t Panic’", ["Don’t Panic", "book"]),
        ("A poster with the text “Go” over a bus that says “Stop now!”", ["Go", "poster", "Stop now!", "bus"]),
        ("a sticker reading 'Honk If You're Happy'", ["Honk If You're Happy", "sticker"]),
    ],
)
def test_quoted_text_is_a_unit_and_so_is_what_carries_it(prompt: str, units: list[str]) -> None:
    assert units_by_rule(prompt) == units


@pytest.mark.parametrize(
    ("prompt", "units"),
    [
        ("a white bird in front of a dinosaur", ["white bird", "dinosaur"]),
        ("three children on a couch", ["three children", "couch"]),
        ("an ornate, high-backed chair with a red cushion", ["ornate, high-backed chair", "red cushion"]),
        ("a photo of a teddy bear wearing a helmet", ["teddy bear", "helmet"]),
        ("a key", ["key"]),
        ("Dogs playing poker", ["Dogs", "poker"]),
        ("a cartoon of a cat in the style of Monet", ["cartoon", "cat", "Monet"]),
    ],
)
def test_noun_phrases_are_the_units_of_other_prompts(prompt: str, units: list[str]) -> None:
    assert units_by_rule(prompt) == units


@pytest.mark.parametrize(
    "prompt",
    [
        "300",
        "?!",
        "🐱🐶",
        "猫が座っている",
        "ᚠᛇᚻ",
        "a",
        "the",
        "swim quickly",
        "''",
        '""',
        "'" * 50,
        "e\u0301" * 3,
        "a\u202eb",
    ],
)
def test_a_prompt_with_a_visible_character_has_a_unit(prompt: str) -> None:
    units = units_by_rule(prompt)
    assert units and all(stands_in(prompt, unit) for unit in units)


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "\u200b\u200d"])
def test_a_prompt_without_one_has_none(prompt: str) -> None:
    assert units_by_rule(prompt) == []


@pytest.mark.parametrize(
    "prompt", ["cat " * 2500, "a " * 5000, '"' * 10_000, "'a " * 3333, "x" * 10_000, "a,b " * 2500]
)
def test_ten_thousand_characters_are_no_problem(prompt: str) -> None:
    units = units_by_rule(prompt)
    assert units and all(stands_in(prompt, unit) for unit in units)


def test_a_required_object_that_the_prompt_does_not_name_leaves_the_rest() -> None:
    metadata = required({"class": "zebra"}, {"class": "dog", "position": ["left of", 0]})
    assert units_by_rule("a photo of a dog", metadata) == ["dog"]
    assert units_by_rule("a photo of a cat", required({"class": "zebra"})) == ["cat"]


def test_an_apostrophe_quotes_nothing() -> None:
    assert quoted_texts("the trophy doesn't fit into Tom's and the girls' room") == []


def test_phrases_say_where_they_stand() -> None:
    prompt = "two red balls on the old table"
    assert [(prompt[p.begin : p.end], p.head) for p in noun_phrases(prompt)] == [
        ("two red balls", "balls"),
        ("old table", "table"),
    ]


def public_prompts(name: str) -> list[tuple[str, dict[str, Any]]]:
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not here")
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    if name.endswith(".jsonl"):
        entries = [json.loads(line) for line in lines]
        return [(entry["prompt"], entry) for entry in entries]
    return [(line.split("\t")[0], {}) for line in lines[name.endswith(".tsv") :]]


@pytest.mark.parametrize("name", ["geneval_metadata.jsonl", "ocr_prompts.txt", "parti_prompts.tsv"])
def test_public_prompts_have_units_and_their_units_have_clip_tokens(name: str) -> None:
    prompts = public_prompts(name)
    if not CLIP_MERGES.is_file():
        pytest.skip(f"{CLIP_MERGES.name} is not here")
    texts = [text for text, _ in prompts]
    units = [units_by_rule(text, metadata) for text, metadata in prompts]
    assert all(units)
    found = TextUnits.from_prompts(texts, units, tokenizers=real_clip_tokenizer())
    total, missing = sum(map(len, units)), sum(map(len, found.missing))
    assert missing <= 0.01 * total
    # What has no token stands behind the 77 positions of CLIP; nothing is lost by the alignment.
    assert found.missing == found.truncated


def test_every_required_object_of_geneval_is_a_unit_with_its_colour() -> None:
    for text, metadata in public_prompts("geneval_metadata.jsonl"):
        units = units_by_rule(text, metadata)
        include = metadata["include"]
        assert len(units) == len(include) + sum("position" in entry for entry in include)
        for entry, unit in zip(include, units, strict=False):
            assert entry.get("color", "") in unit


def test_every_quoted_text_of_the_ocr_prompts_is_a_unit_of_its_own() -> None:
    for text, _ in public_prompts("ocr_prompts.txt"):
        assert text.split('"')[1].strip() in units_by_rule(text)


# Runs in a fresh interpreter that has torch and the packages of the extra `units` alone, of those that are installed.
WITHOUT_THE_REST = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ImportError(f"{name} is hidden")

HIDDEN = set(sys.argv[1:])
sys.meta_path.insert(0, Hidden())
from star_trainer.prompts.units.rules import units_by_rule
print(units_by_rule("a red fox on a mossy stone"))
"""
MODULES = {"pillow": "PIL", "protobuf": "google", "pyyaml": "yaml"}


def test_they_need_torch_and_the_packages_of_their_extra_alone() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names = {extra: {entry.partition(">")[0] for entry in extras[extra]} for extra in ("train", "units")}
    # tqdm is one of TextBlob's, and numpy one that torch looks for.
    hidden = {MODULES.get(name, name) for name in names["train"] - names["units"] - {"tqdm", "numpy"}}
    assert {"accelerate", "peft", "transformers", "diffusers", "PIL"} <= hidden
    command = [sys.executable, "-c", WITHOUT_THE_REST, *hidden]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "['red fox', 'mossy stone']"
