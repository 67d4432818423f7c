"""Configurations: what is wrong is refused before any weights load, by the key's name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from star_trainer.cli import main
from star_trainer.config import ConfigError, describe_keys, load_config, preset_names

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
    "rollout.samples=1": "rollout.samples",
    "rollout.sampler=ode": "rollout.sampler",
    "rollout.eta=0": "rollout.eta",
    "rollout.guidance_scale=0.5": "rollout.guidance_scale",
    "allocation.strength=1.1": "allocation.strength",
    "allocation.sharpness=0": "allocation.sharpness",
    "allocation.combine=sum": "allocation.combine",
    "allocation.clamp=[2, 3]": "allocation.clamp",
    "allocation.clamp=[1]": "allocation.clamp",
    "model.lora.rank=0": "model.lora.rank",
    "model.lora.targets=[]": "model.lora.targets",
    "model.dtype=float64": "model.dtype",
    "model.dtype=float16": "model.dtype",
    "allocation.layers=[]": "allocation.layers",
    "allocation.layers=[-1]": "allocation.layers",
    "evaluation.prompts=1": "evaluation.prompts",
    "prompts.source=nowhere.jsonl": "prompts.held_out",
    "checkpoints.keep=1": "checkpoints.keep",
    "reward.terms={}": "reward.terms",
    "run.seed=-1": "run.seed",
    "run=quick": "run",
    "rollout.eta": "rollout.eta: expected an override like",
    "rollout.eta=[": "rollout.eta",
}


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
        (["rollout.sampler=cps", "train.kl_scale=std_dev"], "train.kl_scale"),
        (["rollout.steps=4", "rollout.sde_steps=5"], "rollout.sde_steps"),
        (["method=shuffled", "rollout.prompts=1"], "rollout.prompts"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
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
