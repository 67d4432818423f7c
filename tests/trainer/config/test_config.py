"""Configurations: what is wrong is refused before any weights load, by the key's name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from star_trainer.cli import main
from star_trainer.config import ConfigError, describe_keys, load_config, preset_names
from star_trainer.families.policy import load_pipeline
from star_trainer.prompts import read_prompts
from star_trainer.studies.units import main as star_units

REFUSED = {
    "train.rate=1e-5": "train.rate: unknown key",
    "trian.learning_rate=1": "trian: unknown key",
    "train.learning_rate=0": "train.learning_rate",
    "train.learning_rate=fast": "train.learning_rate",
    "train.learning_rate=.nan": "train.learning_rate",
    "train.learning_rate=.inf": "train.learning_rate",
    "train.clip_range=1.0": "train.clip_range",
    "train.clip_range=-0.1": "train.clip_range",
    "train.kl_weight=-1": "train.kl_weight",
    "train.kl_scale=sigma": "train.kl_scale",
    "train.iterations=0": "train.iterations",
    "train.iterations=2.5": "train.iterations",
    "train.updates=1000": "train.updates",
    "train.step_fraction=0": "train.step_fraction",
    "train.step_fraction=1.5": "train.step_fraction",
    "train.ema_decay=1": "train.ema_decay",
    "train.advantage_std=median": "train.advantage_std",
    "method=stars": "method",
    "backend=cuda": "backend",
    "rollout.sde_steps=0": "rollout.sde_steps",
    "rollout.sde_window={size: 2}": "rollout.sde_window.range",
    "train.betas=[0.9, 1.0]": "train.betas",
    "reward.extra_objects=liked": "reward.extra_objects",
    "rollout.samples=1": "rollout.samples",
    "rollout.sampler=ode": "rollout.sampler",
    "rollout.eta=0": "rollout.eta",
    "rollout.guidance_scale=0.5": "rollout.guidance_scale",
    "allocation.strength=1.1": "allocation.strength.0: Input should be less than or equal to 1, got 1.1",
    "allocation.strength=high": "allocation.strength.0",
    "allocation.strength=[]": "allocation.strength: List should have at least 1 item",
    "allocation.strength=[1, 2]": "allocation.strength.1",
    "allocation.strength=[0,0,0,0,0,1]": "allocation.strength: expected at most 5 entries",
    "allocation.sharpness=0": "allocation.sharpness",
    "allocation.combine=sum": "allocation.combine",
    "allocation.clamp=[2, 3]": "allocation.clamp",
    "allocation.clamp=[1]": "allocation.clamp",
    "model.lora.rank=0": "model.lora.rank",
    "model.lora.targets=[]": "model.lora.targets",
    "model.dtype=float64": "model.dtype",
    "model.resolution=0": "model.resolution: expected pixels of a side, or [height, width], got 0",
    "model.resolution=[64, 0]": "model.resolution: expected pixels of a side, or [height, width], got [64, 0]",
    "model.resolution=[64]": "model.resolution: expected pixels of a side, or [height, width], got [64]",
    "model.resolution=[64, true]": "model.resolution: expected pixels of a side, or [height, width], got [64, True]",
    "model.resolution=512x768": "model.resolution: expected pixels of a side, or [height, width], got '512x768'",
    "model.dtype=float16": "model.dtype",
    "allocation.layers=[]": "allocation.layers",
    "allocation.layers=[-1]": "allocation.layers.0: expected a number of at least 0, or a name, got -1",
    "evaluation.prompts=1": "evaluation.prompts",
    "prompts.source=nowhere.jsonl": "prompts.held_out",
    "checkpoints.keep=1": "checkpoints.keep",
    "reward.terms={}": "reward.terms",
    "run.seed=-1": "run.seed",
    "run=quick": "run",
    "rollout.eta": "rollout.eta: expected an override like",
    "rollout.eta=[": "rollout.eta",
}


WINDOW = "rollout.sde_window={{size: {}, range: [{}, {}]}}"


@pytest.mark.parametrize("override", REFUSED)
def test_a_bad_setting_is_refused_by_its_key(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [override])
    assert REFUSED[override] in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rollout.sampler=cps", "rollout.eta=1.5"], "rollout.eta"),
        (["rollout.sampler=cps", "rollout.steps=1"], "rollout.steps"),
        (["rollout.steps=1"], "rollout.steps: .*flow_sde"),
        (["rollout.sampler=cps", "train.kl_scale=std_dev"], "train.kl_scale"),
        (["train.objective=dppo"], "train.divergence_limit"),
        (["train.divergence_limit=1e-5"], "train.divergence_limit"),
        (["train.objective=none", "train.clip_range_by_step=spread"], "train.clip_range_by_step"),
        (["method=uniform_position", "train.granularity=image"], "train.granularity"),
        (["allocation.map=geometric", "allocation.strength=[0, 1]"], "allocation.strength"),
        (["method=r0", "allocation.temporal=std"], "allocation.temporal"),
        (["method=r0", "train.objective=none"], "train.objective"),
        (["rollout.steps=4", "rollout.sde_steps=5"], "rollout.sde_steps"),
        (["method=shuffled", "rollout.prompts=1"], "rollout.prompts"),
        ([WINDOW.format(3, 0, 5)], "rollout.sde_window: expected null where rollout.sde_steps"),
        (["rollout.sde_steps=null", WINDOW.format(3, 4, 6)], "rollout.sde_window.range: .*at least the 3 steps"),
        (["rollout.sde_steps=null", WINDOW.format(3, 9, 12)], "rollout.sde_window.range: .*at most the 10"),
        (["rollout.sde_steps=null", "rollout.sampler=cps", WINDOW.format(1, 9, 10)], "rollout.sde_window.range: .*cps"),
        (["rollout.sde_steps=null", WINDOW.format(2, 0, 3), f"allocation.strength={[1.0] * 4}"], "sde_window.range"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config("tiny", overrides)


@pytest.mark.parametrize("text", ["- a\n- b\n", "train: [", "\x00", "just words"])
def test_a_file_that_is_no_configuration_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(str(path))


def test_a_name_that_is_neither_preset_nor_file_lists_the_presets() -> None:
    with pytest.raises(ConfigError, match="tiny"):
        load_config("no_such_preset")


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("method: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError):
        load_config(str(path))


PLACES = {
    "an unknown key": ("method: star\n\ntrain:\n  rate: 1.0\n", [], "line 4: train.rate: unknown key"),
    "an unknown section": ("run:\n  seed: 1\ntrian:\n  updates: 1\n", [], "line 3: trian: unknown key"),
    "a wrong type": ("train:\n  updates: 1\n  iterations: many\n", [], "line 3: train.iterations: "),
    "a value out of range": ("rollout:\n\n  samples: 1\n", [], "line 3: rollout.samples: "),
    "a scalar for a section": ("method: star\nrun: quick\n", [], "line 2: run: "),
    "an entry of a list": ("allocation:\n  layers:\n  - 1\n  - -1\n", [], "line 2: allocation.layers.1: "),
    "a weight of a reward": ("reward:\n  terms:\n    ocr: x\n", [], "line 3: reward.terms.ocr: "),
    "the short form of units": ("method: star\nunits: guess\n", [], "line 2: units.source: "),
    "two settings": ("rollout:\n  steps: 4\n  sde_steps: 5\n", [], "line 3: rollout.sde_steps: "),
    "a merged section": ("train: &t\n  updates: 0\n", [], "line 2: train.updates: "),
    "an override": ("train:\n  updates: 1\n", ["train.updates=0"], "command line: train.updates: "),
    "an override of two settings": (
        "rollout:\n  steps: 4\n  sde_steps: 3\n",
        ["rollout.sde_steps=9"],
        "command line: rollout.sde_steps: ",
    ),
    "an override of a section": ("train:\n  updates: 1\n", ["train={updates: 0}"], "command line: train.updates: "),
    "the file although there is an override": (
        "train:\n  updates: 0\n",
        ["train.iterations=3"],
        "line 2: train.updates: ",
    ),
}


@pytest.mark.parametrize("kind", PLACES)
def test_the_place_of_what_is_wrong_is_named(kind: str, tmp_path: Path) -> None:
    text, overrides, message = PLACES[kind]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), overrides)
    expected = message if message.startswith("command line") else f"{path}, {message}"
    assert str(caught.value).startswith(expected)


def test_every_problem_has_its_own_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  updates: 0\nrollout:\n  samples: 0\n")
    with pytest.raises(ConfigError, match=r"line 4: rollout\.samples.*; .*line 2: train\.updates"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.learning_rat=1", "train.learning_rate"),
        ("train.rate=1", "train.learning_rate"),
        ("trian.updates=1", "train"),
        ("learning_rate=1", "train.learning_rate"),
        ("model.rank=4", "model.lora.rank"),
        ("model.lora.ranks=4", "model.lora.rank"),
        ("batch_size=4", "reward.remote.batch_size or rollout.batch_size or train.batch_size"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_was_meant(override: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [override])
    assert str(caught.value).endswith(f"unknown key; did you mean {meant}?")


def test_nothing_is_suggested_for_what_resembles_no_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qqq: unknown key$"):
        load_config("tiny", ["qqq=1"])
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  lr: 1.0e-4\n")
    with pytest.raises(ConfigError, match="train.lr: unknown key; did you mean train.learning_rate?"):
        load_config(str(path))
    with pytest.raises(ConfigError, match="did you mean tiny"):
        load_config("tinny")


def test_a_term_is_added_and_all_terms_are_replaced() -> None:
    assert load_config("tiny", ["reward.terms.ocr=0.5"]).reward.terms == {"scene_graded": 1.0, "ocr": 0.5}
    assert load_config("tiny", ["reward.terms={ocr: 0.5}"]).reward.terms == {"ocr": 0.5}
    assert load_config("tiny", ["reward.terms.a.b:c=1"]).reward.terms == {"scene_graded": 1.0, "a.b:c": 1.0}


def test_a_section_can_be_merged_into_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rollout: &shared\n  batch_size: 3\ntrain:\n  <<: *shared\n  updates: 1\n")
    assert load_config(str(path)).train.batch_size == 3


def test_overrides_reach_nested_keys_and_the_folder_is_filled_in() -> None:
    config = load_config("tiny", ["train.learning_rate=1e-5", "model.lora=null", "run.seed=7", "method=uniform"])
    assert config.train.learning_rate == 1e-5
    assert config.model.lora is None
    assert config.run.folder == "runs/tiny_uniform_7"


def test_the_learning_rate_has_a_short_name() -> None:
    assert load_config("tiny", ["train.lr=1e-5"]).train.learning_rate == 1e-5


def test_every_preset_loads() -> None:
    assert "tiny" in preset_names()
    for name in preset_names():
        load_config(name)


def test_the_help_names_every_key_of_the_tiny_preset() -> None:
    keys = describe_keys()
    for key in ("train.learning_rate", "model.lora.rank", "allocation.strength", "evaluation.prompts"):
        assert f"{key}=" in keys


def test_the_help_gives_the_values_of_a_setting_once() -> None:
    lines = {line.split("=")[0].strip(): line for line in describe_keys().splitlines()}
    assert "pipeline | even; noise levels" in lines["model.levels"]
    assert "variance | std_dev | velocity" in lines["train.kl_scale"] and "flow_sde | " in lines["rollout.sampler"]
    assert " | " not in lines["method"] and "; of the" not in lines["train.betas"]


def test_the_help_says_what_adds_a_term_and_what_replaces_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "reward.terms.NAME=WEIGHT adds" in printed and "reward.terms='{NAME: WEIGHT}' replaces" in printed


def test_the_command_answers_a_bad_setting_with_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "train.rate=1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "train.rate" in error


def test_a_bad_setting_is_refused_without_loading_torch() -> None:
    code = (
        "import sys; from star_trainer.cli import main; status = main(['tiny', 'method=x']); "
        "print(status, 'torch' in sys.modules)"
    )
    path = ":".join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path}, check=True
    )
    assert result.stdout.split() == ["2", "False"]


PATHS = {
    "run.folder": [],
    "model.pipeline": [],
    "prompts.source": ["prompts.held_out=x"],
    "prompts.held_out": ["prompts.source=x"],
    "units.model": ["units.source=llm"],
    "reward.models.clip": [],
    "reward.models.pickscore": [],
    "reward.models.pickscore_processor": [],
    "reward.models.detector": [],
    "r0.small_decoder": [],
}


@pytest.mark.parametrize("key", PATHS)
def test_the_home_folder_may_be_written_as_a_tilde_in_every_setting(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    value: Any = load_config("tiny", [f"{key}=~/mine", *PATHS[key]])
    for name in key.split("."):
        value = getattr(value, name)
    assert value == "/somewhere/mine"


def test_files_and_options_may_begin_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("run: {seed: 7}\n")
    (tmp_path / "p.txt").write_text("a red circle\n")
    assert load_config("~/mine.yaml").run.seed == 7
    assert star_units(["~/p.txt", "--out=~/out.jsonl"]) == 0
    assert [prompt.units for prompt in read_prompts("~/out.jsonl", "x")] == [("red circle",)]
    with pytest.raises(ConfigError, match=r"model\.pipeline: no such folder: .*/no_such_pipeline"):
        load_pipeline(load_config("tiny", ["model.pipeline=~/no_such_pipeline"]).model)


@pytest.mark.parametrize(
    ("key", "address"),
    [
        *(
            ("reward.remote.url", address)
            for address in ("localhost:8100", "[http://box, gpu-box]", "http://", "http://a:b")
        ),
        *(("units.endpoint", address) for address in ("10.0.0.1:8100/v1", "ftp://box", "http://a b")),
    ],
)
def test_an_address_that_no_request_can_go_to_is_refused_up_front(
    key: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["reward.terms={remote: 1.0}"] if key.startswith("reward") else ["units.source=llm", "units.model=x"]
    assert main(["tiny", "--dry-run", *more, f"{key}={address}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{key}: expected an address that begins with http:// or https://, got" in line


def test_one_address_or_several() -> None:
    one, two = "http://localhost:8100", "https://user@box.example:443/rewards"
    for value, expected in ((one, [one]), (f"[{one}, '{two}']", [one, two]), ("null", [])):
        assert load_config("tiny", [f"reward.remote.url={value}"]).reward.remote.url == expected
    with pytest.raises(ConfigError, match=r"reward\.remote\.url"):
        load_config("tiny", [f"reward.remote.url=[{one}, box:80]"])
