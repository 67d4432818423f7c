"""FLUX.1 and FLUX.2 klein where the model has no guidance, what their families refuse, and published sizes."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from star_trainer.config import ConfigError, load_config
from star_trainer.dry_run import plan
from star_trainer.families.policy import load_policy
from star_trainer.sampling import denoise

from tests.trainer.families.small_pipelines import LENGTH, PIPELINES, flux, flux2_klein

needs_klein = pytest.mark.skipif(
    not hasattr(diffusers, "Flux2KleinPipeline"), reason="this version of diffusers has no klein"
)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distilled to few steps: without guidance, and with levels that no resolution shifts."""
    folder = tmp_path_factory.mktemp("schnell")
    pipeline = flux(guidance_embeds=False)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("levels", ["pipeline", "even"])
def test_a_distilled_model_without_guidance_samples_as_its_pipeline(schnell: Path, levels: str) -> None:
    settings = [f"model.pipeline={schnell}", "model.resolution=[24, 40]", f"model.max_sequence_length={LENGTH}"]
    policy = load_policy(load_config("tiny", [*settings, "model.lora.targets=null", f"model.levels={levels}"]).model)
    pipeline = DiffusionPipeline.from_pretrained(schnell)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = policy.encode(["a dog"])
    found = denoise(policy, conditioning, steps=4, kind="ode", generator=torch.Generator(), initial=noise).latents[-1]
    expected = PIPELINES["flux"].sample(pipeline, "a dog", noise, (24, 40), 4, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "guidance" not in conditioning.tensors


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rollout.guidance_scale=3.5", "rollout.guidance_scale: expected 1 for a model without guidance, got 3.5"),
        ("evaluation.guidance_scale=2", "evaluation.guidance_scale: expected 1 for a model without guidance, got 2.0"),
        (
            "model.max_sequence_length=513",
            "model.max_sequence_length: expected at most 512 for a FluxPipeline, got 513",
        ),
        ("model.resolution=36", "model.resolution: expected multiples of 8, got 36"),
    ],
)
def test_what_the_model_cannot_take_is_refused(schnell: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(load_config("tiny", [f"model.pipeline={schnell}", "model.lora.targets=null", setting]))


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    flux().save_pretrained(tmp_path)
    (tmp_path / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.pipeline: .*its text_encoder_2: "):
        load_policy(load_config("tiny", [f"model.pipeline={tmp_path}"]).model)


@pytest.mark.parametrize(
    ("name", "transformer"),
    # As published: twelve billion, and ten million more for the embedding of guidance.
    [("FLUX.1-schnell", 11_891_178_560), ("FLUX.1-dev", 11_901_408_320)],
)
def test_published_models_are_known_without_their_files(name: str, transformer: int) -> None:
    settings = [f"model.pipeline=black-forest-labs/{name}", "model.dtype=bfloat16", "model.resolution=[512, 768]"]
    found = plan(load_config("tiny", [*settings, "model.lora.targets=null", "model.max_sequence_length=512"]))
    assert found.parameters["transformer"] == transformer
    assert found.parameters["text encoders"] == pytest.approx(4.76e9 + 0.123e9, rel=0.01)
    assert found.parameters["autoencoder"] == pytest.approx(83.8e6, rel=0.01)
    assert found.latent == (16, 64, 96) and found.tokens == 32 * 48 + 512


@needs_klein
def test_a_distilled_klein_has_no_guidance_whatever_its_transformer_says(tmp_path: Path) -> None:
    flux2_klein(is_distilled=True).save_pretrained(tmp_path)
    settings = [f"model.pipeline={tmp_path}", "model.lora.targets=null"]
    with pytest.raises(ConfigError, match="rollout.guidance_scale: expected 1 for a model without guidance, got 4.0"):
        plan(load_config("tiny", [*settings, "rollout.guidance_scale=4.0"]))
    config = load_config("tiny", [*settings, "evaluation.guidance_scale=4.0"])
    policy = load_policy(config.model)
    with pytest.raises(ConfigError, match="evaluation.guidance_scale"):
        policy.check(config)
    assert policy.guidance(1, 1.0) is None


@pytest.mark.parametrize(
    ("name", "transformer", "encoder", "guided"),
    # As published: four and nine billion, behind Qwen3 of four and eight.
    [
        ("FLUX.2-klein-base-4B", 3.88e9, 4.02e9, True),
        ("FLUX.2-klein-4B", 3.88e9, 4.02e9, False),
        ("FLUX.2-klein-base-9B", 9.08e9, 8.19e9, True),
    ],
)
def test_published_kleins_are_known_without_their_files(
    name: str, transformer: float, encoder: float, guided: bool
) -> None:
    settings = [f"model.pipeline=black-forest-labs/{name}", "model.dtype=bfloat16", "model.resolution=[512, 768]"]
    settings += ["model.lora.targets=null", "model.max_sequence_length=512"]
    found = plan(load_config("tiny", settings))
    assert found.parameters["transformer"] == pytest.approx(transformer, rel=0.005)
    assert found.parameters["text encoders"] == pytest.approx(encoder, rel=0.005)
    assert found.parameters["autoencoder"] == pytest.approx(84e6, rel=0.01)
    assert found.latent == (128, 32, 48) and found.tokens == 32 * 48 + 512
    if guided:
        assert plan(load_config("tiny", [*settings, "rollout.guidance_scale=4.0"])).update_calls > found.update_calls


@needs_klein
def test_a_diffusers_without_the_pipeline_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flux2_klein().save_pretrained(tmp_path)
    monkeypatch.setattr(diffusers, "Flux2KleinPipeline", None)
    with pytest.raises(ConfigError, match=r"model\.pipeline: .*has no Flux2KleinPipeline"):
        load_policy(load_config("tiny", [f"model.pipeline={tmp_path}"]).model)
