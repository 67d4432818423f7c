"""Prompts and rewards that do not go together are refused before any weights load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from star_trainer import train as loop
from star_trainer.cli import main
from star_trainer.config import ConfigError, load_config
from star_trainer.run.inputs import check_prompts, load_prompts
from star_trainer.worlds.requirements import check_requirements

BENCH = {"prompt": "a photo of a bench", "include": [{"class": "bench", "count": 1}], "units": ["bench"]}
BARE = {"prompt": "a cat", "units": ["cat"]}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def arguments(source: Path, held_out: Path, *overrides: str) -> list[str]:
    return ["tiny", f"prompts.source={source}", f"prompts.held_out={held_out}", *overrides]


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("weights were to be loaded")

    monkeypatch.setattr(loop, "build_state", fail)


@pytest.mark.parametrize("term", ["scene_strict", "geneval_strict", "geneval_flow_grpo"])
@pytest.mark.parametrize("where", ["source", "held_out"])
def test_prompts_without_requirements_are_refused_for_rewards_of_requirements(
    term: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write(tmp_path / "good.jsonl", BENCH, BENCH), write(tmp_path / "bad.jsonl", BENCH, BARE, BARE)
    files = (bad, good) if where == "source" else (good, bad)
    assert main(arguments(*files, f"reward.terms={{{term}: 1.0}}")) == 2
    error = capsys.readouterr().err
    assert f"prompts.{where}: {bad}: 2 of 3 prompts do not suit the reward {term}: the prompt 'a cat'" in error


def test_what_must_not_be_there_alone_is_nothing_for_flow_grpos_reward(tmp_path: Path) -> None:
    only = {"prompt": "no dog", "exclude": BENCH["include"], "units": ["dog"]}
    file = write(tmp_path / "prompts.jsonl", only, only)
    check_prompts(load_config("tiny", arguments(file, file, "reward.terms={geneval_graded: 1.0}")[1:]))
    with pytest.raises(ConfigError, match=r"2 of 2 prompts.*geneval_flow_grpo: .*'exclude' alone is not scored"):
        check_prompts(load_config("tiny", arguments(file, file, "reward.terms={geneval_flow_grpo: 1.0}")[1:]))


def test_prompts_without_quoted_text_are_refused_for_ocr(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", {**BARE, "prompt": 'a sign that says "cat"'})
    bad = write(tmp_path / "bad.jsonl", BARE)
    overrides = ["reward.terms={ocr: 1.0}"]
    check_prompts(load_config("tiny", arguments(good, good, *overrides)[1:]))
    with pytest.raises(ConfigError, match=r"prompts\.source.*ocr.*quoted text"):
        check_prompts(load_config("tiny", arguments(bad, good, *overrides)[1:]))
    with pytest.raises(ConfigError, match=r"prompts\.source: scenes.*ocr"):
        check_prompts(load_config("tiny", overrides))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "include"),
        ({"include": []}, "include"),
        ({"include": "a dog"}, "include"),
        ({"include": ["dog"]}, "class.*'dog'"),
        ({"include": [{"class": "dog"}]}, "count"),
        ({"include": [{"class": "dog", "count": 0}]}, "count"),
        ({"include": [{"class": "dog", "count": "1"}]}, "count"),
        ({"include": [{"class": 3, "count": 1}]}, "class"),
        ({"include": [{"class": "dog", "count": 1, "color": 3}]}, "colour"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "position"),
        ({"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["near", 0]}]}, "near"),
        ({"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog"}]}, "count"),
    ],
)
def test_malformed_requirements_are_refused(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_requirements(metadata)


def test_requirements_that_can_be_judged_pass() -> None:
    dog, cat = {"class": "dog", "count": 2}, {"class": "cat", "count": 1, "position": ["left of", 0], "color": "red"}
    check_requirements({"include": [dog, cat], "exclude": [{"class": "dog", "count": 3}]})
    check_requirements({"exclude": [dog]})


def test_maps_without_units_are_refused_and_rules_are_recommended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write(tmp_path / "p.jsonl", {k: v for k, v in BENCH.items() if k != "units"}, {**BENCH, "units": []})
    for method in ("star", "shuffled", "inverted"):
        assert main(arguments(prompts, prompts, f"method={method}")) == 2
        assert "set units=rules" in capsys.readouterr().err
    check_prompts(load_config("tiny", arguments(prompts, prompts, "units=rules")[1:]))
    check_prompts(load_config("tiny", arguments(prompts, prompts, "method=uniform")[1:]))
    some = write(tmp_path / "some.jsonl", BENCH, {**BENCH, "units": []})
    check_prompts(load_config("tiny", arguments(some, prompts)[1:]))


def test_a_missing_file_is_said_to_come_from_where_the_preset_has_it(tmp_path: Path) -> None:
    config = load_config("tiny", [*arguments(tmp_path / "x", tmp_path / "y")[1:], "prompts.origin=see the manual"])
    with pytest.raises(ConfigError, match=r"prompts\.source: no such file: .*x \(see the manual\)"):
        check_prompts(config)


FOREIGN = {**BENCH, "units": ["benches", "Parkbank"]}


def test_maps_where_no_unit_stands_in_its_prompt_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write(tmp_path / "p.jsonl", FOREIGN, FOREIGN)
    for more in ([], ["--dry-run"]):
        assert main(arguments(prompts, prompts, *more)) == 2
        assert "none stands in its prompt" in (error := capsys.readouterr().err) and "'benches' in" in error
    check_prompts(load_config("tiny", arguments(prompts, prompts, "method=uniform")[1:]))


def test_a_dry_run_says_which_units_do_not_stand_in_their_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    korean = {**BENCH, "prompt": "빨간 원이 있다", "units": ["빨간 원", "있다"]}
    prompts = write(tmp_path / "p.jsonl", BENCH, korean)
    assert main(arguments(prompts, prompts, "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "1 of 3 text units do not stand in their prompt" in printed and "'빨간 원' in '빨간 원이 있다'" in printed
    assert main(arguments(prompts, prompts, "--dry-run", "method=uniform")) == 0
    assert "text units do not" not in capsys.readouterr().out


def test_a_held_out_file_with_one_prompt_over_and_over_is_refused(tmp_path: Path) -> None:
    config = load_config(
        "tiny", arguments(write(tmp_path / "p.jsonl", BENCH), write(tmp_path / "h.jsonl", *[BENCH] * 4))[1:]
    )
    with pytest.raises(ConfigError, match=r"prompts\.held_out: .* holds one prompt"):
        load_prompts(config.prompts)
