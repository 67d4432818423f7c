"""Adapters of elsewhere are taken up whole, in either format, or refused by the names that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from star_trainer.config import ConfigError, Lora, Model, load_config
from star_trainer.families.policy import load_pipeline, load_policy
from star_trainer.studies.evaluate.cli import main

TARGETS = ["to_q", "to_v"]


def filled(module: Any, size: float = 0.3) -> Any:
    generator = torch.Generator().manual_seed(0)
    for name, value in module.named_parameters():
        if "lora_" in name:
            value.data = size * torch.randn(value.shape, generator=generator)
    return module


def as_diffusers(
    folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]] = dict, encoder: bool = False
) -> Path:
    pipeline = load_pipeline(Model())
    layers = {}
    for part in ("transformer", "text_encoder")[: 1 + encoder]:
        module = getattr(pipeline, part)
        module.add_adapter(
            LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS if part == "transformer" else ["q_proj"])
        )
        layers[f"{part}_lora_layers"] = change(get_peft_model_state_dict(filled(module)))
    metadata = pipeline.transformer.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(folder, **layers, transformer_lora_adapter_metadata=metadata)
    return folder


def as_peft(folder: Path) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    filled(get_peft_model(load_pipeline(Model()).transformer, config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("save", [as_diffusers, as_peft])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_starts_from_the_very_weights(save: Callable[[Path], Path], dtype: Any, tmp_path: Path) -> None:
    # Of another rank than the settings say: that of the file counts.
    policy = load_policy(Model(adapter=str(save(tmp_path / "lora")), lora=Lora(rank=2), dtype=dtype))
    expected = load_pipeline(Model()).transformer
    expected.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    weights = {name: value for name, value in filled(expected).named_parameters() if "lora_" in name}
    found = policy.trainable()
    assert found.keys() == weights.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, weights[name]) for name, value in found.items())
    (scale,) = {module.scaling["default"] for module in policy.model.modules() if hasattr(module, "scaling")}
    assert scale == 2.0


def deeper(layers: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("blocks.3.", "blocks.30."): value for name, value in layers.items()}


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "of a deeper model": (lambda folder: as_diffusers(folder, deeper), "transformer_blocks.30"),
    "without some matrices": (
        lambda folder: as_diffusers(folder, lambda layers: {n: v for n, v in layers.items() if "to_q.lora_B" not in n}),
        "to_q.lora_B.weight",
    ),
    "of other widths": (
        lambda folder: as_diffusers(folder, lambda layers: {n: v[..., :-1].contiguous() for n, v in layers.items()}),
        "other shapes",
    ),
    "with a text encoder's": (lambda folder: as_diffusers(folder, encoder=True), "text_encoder."),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_whole_is_refused_by_its_names(kind: str, tmp_path: Path) -> None:
    save, named = REFUSED[kind]
    with pytest.raises(ConfigError, match=rf"model\.adapter: .*{named}"):
        load_policy(Model(adapter=str(save(tmp_path / "lora"))))


def test_star_eval_takes_both_formats_and_its_base_is_the_pipeline_alone(tmp_path: Path) -> None:
    saved = {"diffusers": as_diffusers(tmp_path / "diffusers"), "peft": as_peft(tmp_path / "peft")}
    options = ["--count", "2", "--samples", "1", "--steps", "2", "--rewards", "scene_graded"]

    def pictures(name: str, *adapter: str) -> dict[str, np.ndarray]:
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(["tiny", *options, *adapter, "--out", str(tmp_path / name)]) == 0
        files = (tmp_path / name).rglob("*.png")
        return {str(path.relative_to(tmp_path / name)): np.asarray(Image.open(path)).astype(int) for path in files}

    alone = pictures("alone")
    by_diffusers = pictures("a", "--adapter", str(saved["diffusers"]))
    by_peft = pictures("b", f"model.adapter={saved['peft']}")
    assert by_diffusers.keys() == by_peft.keys()
    assert all(np.array_equal(by_diffusers[name], picture) for name, picture in by_peft.items())
    assert all(np.array_equal(by_peft[name], picture) for name, picture in alone.items())
    assert any(np.abs(by_peft[name.replace("base", "adapter")] - picture).max() > 5 for name, picture in alone.items())


def test_an_adapter_needs_adapters_to_train() -> None:
    with pytest.raises(ConfigError, match=r"model\.adapter: expected null"):
        load_config("tiny", ["model.adapter=x", "model.lora=null"])
