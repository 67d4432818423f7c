"""Stable Diffusion 3 pipelines that are not as they should be: refused by name, or run as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from safetensors.torch import load_file, save_file
from star_trainer.config import ConfigError, Model, load_config
from star_trainer.config.paths import TINY_PIPELINE
from star_trainer.dry_run import plan, report
from star_trainer.families.policy import load_policy
from star_trainer.sampling import denoise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY_PIPELINE, tmp_path / "pipeline")


def load(folder: Path) -> Any:
    return load_policy(Model(pipeline=str(folder), max_sequence_length=16))


def leave_out(folder: Path, *parts: str) -> None:
    """As `save_pretrained` leaves a pipeline that was made without them."""
    index = json.loads((folder / "model_index.json").read_text())
    for part in parts:
        shutil.rmtree(folder / part)
        index[part] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3"])
def test_text_encoders_that_lack_weights_are_refused(part: str, folder: Path) -> None:
    path = folder / part / "model.safetensors"
    tensors = load_file(path)
    lacking = next(name for name in sorted(tensors) if "layer" in name)
    save_file({name: value for name, value in tensors.items() if name != lacking}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"its {part} has no weights for "):
        load(folder)


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling"),
        (FlowMatchHeunDiscreteScheduler(), "got FlowMatchHeunDiscreteScheduler"),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            "got DPMSolverMultistepScheduler",
        ),
    ],
)
def test_schedulers_whose_steps_are_not_eulers_are_refused(scheduler: Any, named: str, folder: Path) -> None:
    use(scheduler, folder)
    with pytest.raises(ConfigError, match=named):
        load(folder)


def use(scheduler: Any, folder: Path) -> None:
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("levels", [{}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True}], ids=str)
def test_eulers_steps_are_the_pipelines_on_whatever_levels_its_scheduler_sets(
    levels: dict[str, bool], folder: Path
) -> None:
    use(FlowMatchEulerDiscreteScheduler(shift=1.5, **levels), folder)
    policy = load(folder)
    conditioning = policy.encode(["a red circle"])
    noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    found = denoise(policy, conditioning, steps=6, kind="ode", generator=torch.Generator(), initial=noise).latents[-1]
    expected = policy.pipeline(
        prompt_embeds=conditioning.tensors["text"],
        pooled_prompt_embeds=conditioning.tensors["pooled"],
        guidance_scale=1.0,
        num_inference_steps=6,
        latents=noise,
        height=64,
        width=64,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_pipeline_made_without_its_t5_runs_and_is_counted_without_it(folder: Path) -> None:
    whole = plan(load_config("tiny", [f"model.pipeline={folder}"]))
    leave_out(folder, "text_encoder_3", "tokenizer_3")
    config = load_config("tiny", [f"model.pipeline={folder}"])
    found, policy = plan(config), load(folder)
    encoders = (policy.pipeline.text_encoder, policy.pipeline.text_encoder_2)
    assert found.parameters["text encoders"] == sum(p.numel() for encoder in encoders for p in encoder.parameters())
    assert found.parameters["text encoders"] < whole.parameters["text encoders"]
    assert found.tokens == policy.grid[0] * policy.grid[1] + policy.encode(["a"]).tensors["text"].shape[1]
    assert "without text_encoder_3" in report(config)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3"])
def test_a_part_that_is_missing_from_the_folder_is_named(part: str, folder: Path) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(ConfigError, match=f"its {part} has no config.json"):
        plan(load_config("tiny", [f"model.pipeline={folder}"]))
    with pytest.raises(ConfigError, match=r"model\.pipeline"):
        load(folder)
