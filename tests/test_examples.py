"""The examples: each runs as a user starts it, on the small pipeline, and is short."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> dict[str, Any]:
    """Run an example as ``python examples/NAME ARGUMENTS``; returns its names."""
    path = str(EXAMPLES / name)
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    state = torch.get_rng_state()
    try:
        return runpy.run_path(path, run_name="__main__")
    finally:
        torch.set_rng_state(state)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_they_are_short_and_use_what_is_public(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert "star_kernels._" not in text and "star_kernels." not in text.replace("import star_kernels as sk", "")


def test_own_loop_trains_an_adapter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    run(monkeypatch, "own_loop.py", "--iterations", "1", "--out", str(tmp_path))
    assert capsys.readouterr().out.startswith("iteration 1: reward 0.")
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    # The second matrix of an adapter begins at zero: what is there has been learnt.
    assert any(weights[name].abs().max() > 0 for name in weights if "lora_B" in name)
    assert all(name.startswith("transformer.") for name in weights)


def test_flow_grpo_s_loop_moves_away_from_its_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "flow_grpo.py", "--iterations", "1")
    line = capsys.readouterr().out
    assert line.startswith("iteration 1: reward 0.")
    # The second batch is trained on after an update by the first one.
    assert 0.0 < float(line.partition("KL ")[2]) < 1e-3


def test_attention_maps_find_an_object_where_it_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "maps.png"
    names = run(monkeypatch, "attention_maps.py", "a photo of a red circle", "--steps", "8", "--out", str(out))
    assert Image.open(out).size[0] > 800
    pipe = names["DiffusionPipeline"].from_pretrained(names["TINY_PIPELINE"], torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 8, "generator": generator}
    picture, maps = names["sample"](pipe, "a photo of a red circle", ["circle", "photo"], slice(None), **options)
    assert list(maps) == ["circle", "photo"] and maps["circle"].shape == (8, 8)
    assert maps["circle"].mean() == pytest.approx(1.0, abs=1e-5)
    red, green, blue = picture.resize((8, 8)).split()
    redness = torch.tensor(list(red.tobytes())).float() - torch.tensor(list(green.tobytes())).float()
    inside = (redness.view(8, 8) > redness.max() / 2).numpy()
    # 6.7 and 1.6; in the row without the prompt 2.7 and 1.8.
    contrast = {name: values[inside].mean() / values[~inside].mean() for name, values in maps.items()}
    assert contrast["circle"] > 4 and contrast["photo"] < 2.5
    with pytest.raises(SystemExit, match="--units: expected words of the prompt"):
        names["sample"](pipe, "a photo of a red circle", ["square"], slice(None))


def test_star_in_flow_factory_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flow_factory", None)
    with pytest.raises(SystemExit, match="needs Flow-Factory"):
        run(monkeypatch, "flow_factory/star.py", "sd3_5.yaml")


REWARD = """
import numpy as np, torch
from flow_factory.rewards.abc import PointwiseRewardModel, RewardModelOutput

class Red(PointwiseRewardModel):
    required_fields = ("prompt", "image")

    def __call__(self, prompt, image=None, **_):
        red = [float(np.asarray(picture)[..., 0].mean()) for picture in image]
        return RewardModelOutput(rewards=torch.tensor(red), extra_info={})
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("sampler", ["Flow-SDE", "CPS"])
def test_star_trains_in_flow_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    pytest.importorskip("flow_factory", reason="Flow-Factory is not installed")
    import yaml
    from star_trainer.config.paths import TINY_PIPELINE

    (tmp_path / "train.txt").write_text("a photo of a red circle\na photo of a blue square above a red cross\n")
    (tmp_path / "red_reward.py").write_text(REWARD)
    for folder in (tmp_path, EXAMPLES / "flow_factory"):
        monkeypatch.syspath_prepend(folder)
    config = yaml.safe_load((EXAMPLES / "flow_factory" / "sd3_5.yaml").read_text())
    config["mixed_precision"] = "no"
    config["data"] |= {"dataset_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    config["model"]["model_name_or_path"] = str(TINY_PIPELINE)
    config["train"] |= {"resolution": 64, "num_inference_steps": 4, "per_device_batch_size": 4, "group_size": 4}
    config["train"] |= {"unique_sample_num_per_epoch": 2, "gradient_step_per_epoch": 1, "max_epochs": 2}
    config["train"] |= {"guidance_scale": 2.0, "ema_decay": 0, "ema_device": "cpu", "ref_param_device": "cpu"}
    config["train"]["latent_storage_dtype"] = "bf16"
    config["scheduler"] |= {"dynamics_type": sampler, "num_sde_steps": 2}
    config["log"] |= {"save_dir": str(tmp_path), "save_freq": 0}
    config["rewards"] = [{"name": "red", "reward_model": "red_reward.Red", "batch_size": 4, "device": "cpu"}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    logged: list[dict[str, Any]] = []
    star = importlib.import_module("star")
    monkeypatch.setattr(star.StarTrainer, "log_data", lambda self, data, step: logged.append(data))
    run(monkeypatch, "flow_factory/star.py", str(tmp_path / "config.yaml"))
    # One update an epoch: ratios are of the policy that sampled, and the second one has left its reference.
    first, second = [data for data in logged if "train/clip_fraction" in data]
    for update in (first, second):
        assert float(update["train/ratio_mean"]) == 1.0 and float(update["train/clip_fraction"]) == 0.0
    assert float(first["train/kl"]) == 0.0 < float(second["train/kl"])
