"""Stable Diffusion: its schedule, its layers at several resolutions, and what its families refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import star_trainer.cli
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from star_trainer.config import ConfigError, load_config
from star_trainer.dry_run import plan
from star_trainer.families import FAMILIES
from star_trainer.families.noising import DIFFUSION, FLOW, Noising
from star_trainer.families.pipelines.unet import ddim, ddim_schedule
from star_trainer.families.policy import Policy, load_policy
from star_trainer.prompts import Prompt
from star_trainer.sampling import denoise, text_units

import star_kernels as sk
from star_kernels.recorder import unet as recorded
from tests.tiny_models import CLIP_MERGES, real_clip_tokenizer
from tests.trainer.families.small_pipelines import NOISE, PIPELINES, stable_diffusion, unet
from tests.trainer.families.test_families import POLICY_GRADIENT, TRAINER_TESTS, TRAINING

SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
PROMPT = "a red circle and a blue square"
SETTINGS = ["model.resolution=[32, 48]", "model.lora.targets=null", *PIPELINES["sd15"].settings]


@pytest.fixture(scope="module")
def folder(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return made_once("pipeline_sd15", PIPELINES["sd15"].save)


def policy_of(folder: Path, *overrides: str) -> Policy:
    return load_policy(load_config("tiny", [f"model.pipeline={folder}", *SETTINGS, *overrides]).model)


@pytest.mark.parametrize(
    ("name", "unet", "encoders", "layers", "grid"),
    # As published: 860 million and 2.6 billion.
    [(SD15, 859_520_964, 123_060_480, 16, (64, 96)), (SDXL, 2_567_463_684, 817_720_320, 70, (32, 48))],
)
def test_published_models_are_known_without_their_files(
    name: str, unet: int, encoders: int, layers: int, grid: tuple[int, int]
) -> None:
    config = load_config("sd14_hps", [f"model.pipeline={name}", "model.resolution=[512, 768]", "model.lora={}"])
    found = plan(config)
    assert found.parameters == {"unet": unet, "text encoders": encoders, "autoencoder": 83_653_863}
    assert found.latent == (4, 64, 96) and found.tokens == grid[0] * grid[1] + 77
    family = next(family for family in FAMILIES.values() if name in family.published)
    shapes = family.shapes(name)
    with torch.device("meta"):
        model, _ = family.build_models(shapes)
    assert len(recorded.layers(model)) == family.num_layers(model.config) == layers
    heads, head_dim = family.attention_heads(model.config)
    finest = max(recorded.layers(model), key=lambda layer: layer.name.startswith("down_blocks.")).attention
    assert (finest.heads, finest.to_q.out_features) == (heads, heads * head_dim)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_even_levels_are_those_of_the_trailing_spacing_in_diffusers(folder: Path, spacing: str) -> None:
    """Four steps: 999, 749, 499 and 249 in the place of 751, 501, 251 and 1."""
    policy = policy_of(folder, f"model.levels={'even' if spacing == 'trailing' else 'pipeline'}")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"steps": 4, "kind": "ode", "generator": torch.Generator(), "initial": noise}
    found = denoise(policy, policy.encode([PROMPT]), **options).latents[-1]
    call = {"height": 32, "width": 48, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    expected = pipeline(PROMPT, latents=noise, **call).images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    levels, timesteps = policy.schedule(4)
    assert timesteps.tolist() == ([999, 749, 499, 249] if spacing == "trailing" else [751, 501, 251, 1])
    assert bool((levels.diff() > 0).all()) and levels[-1] == policy.pipeline.scheduler.alphas_cumprod[0]


def test_a_timestep_is_found_by_its_level(folder: Path) -> None:
    policy = policy_of(folder)
    known = policy.pipeline.scheduler.alphas_cumprod
    of = torch.tensor([999, 998, 500, 1, 0])
    torch.testing.assert_close(policy.family.timesteps_at(policy.pipeline, known[of]), of.float(), rtol=0, atol=0.02)
    between = policy.family.timesteps_at(policy.pipeline, (known[400:401] + known[401:402]) / 2)
    torch.testing.assert_close(between, torch.tensor([400.5]), rtol=0, atol=0.02)
    # At σ = 1/2 of flow matching there is as much noise as image.
    assert DIFFUSION.level_of(torch.tensor([0.5])).item() == 0.5


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_renoised_step_keeps_the_clean_latents_and_the_amount_of_noise(share: float) -> None:
    level, following = torch.tensor(0.05), torch.tensor(0.4)
    row = DIFFUSION.renoised(level, following, torch.full((2,), share, dtype=torch.float64))
    assert row.stochastic == (share > 0.0) and row.std.shape == (2,)
    a, b, s = (value.double() for value in (row.sample_scale, row.velocity_scale, row.std))
    torch.testing.assert_close(a * level.sqrt(), following.sqrt().expand(2).double(), rtol=1e-6, atol=0)
    kept = a * (1 - level).sqrt() + b
    torch.testing.assert_close(kept**2 + s**2, (1 - following).expand(2).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(s**2, share**2 * (1 - following).expand(2).double(), rtol=1e-6, atol=0)
    if share == 0.0:
        plain = DIFFUSION.step("ode", level, following, eta=1.0)
        torch.testing.assert_close(row.velocity_scale, plain.velocity_scale.expand(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("noising", [FLOW, DIFFUSION])
def test_what_is_mixed_is_parted_again_by_the_right_prediction(noising: Noising) -> None:
    clean, noise = torch.randn(2, 2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.3, 0.8])
    mixed, row = noising.mixed(clean, noise, level), noising.to_clean(level)
    right = noise - clean if noising is FLOW else noise
    a, b = (value.view(-1, 1, 1, 1) for value in (row.sample_scale, row.velocity_scale))
    torch.testing.assert_close(a * mixed + b * right, clean, rtol=1e-5, atol=1e-5)


def test_coarse_layers_by_name_give_maps_whose_tokens_share_their_places(folder: Path) -> None:
    settings = [f"model.pipeline={folder}", *SETTINGS, "allocation.layers=[mid_block]"]
    config = load_config("tiny", settings)
    policy, prompts = load_policy(config.model), [Prompt(PROMPT, {}, ("red circle", "blue square"))]
    policy.check(config)
    options: dict[str, Any] = {"steps": 2, "kind": "ode", "generator": torch.Generator().manual_seed(0)}
    options |= {"units": text_units(policy, prompts), "allocation": config.allocation}
    maps = denoise(policy, policy.encode([PROMPT]), **options).weights
    assert maps is not None and maps.shape == (2, 1, 8, 12) == (2, 1, *policy.grid)
    coarse = maps[..., ::2, ::2]
    assert float(coarse.std()) > 1e-4
    assert torch.equal(maps, coarse.repeat_interleave(2, -2).repeat_interleave(2, -1))
    torch.testing.assert_close(maps.mean((-2, -1)), torch.ones(2, 1))
    wrong = load_config("tiny", [*settings, "allocation.layers=[mid_block, up_blocks.7]"])
    for check in (policy.check, plan):
        with pytest.raises(ConfigError, match=r"^allocation\.layers: expected names of layers .*got 'up_blocks\.7'"):
            check(wrong)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type epsilon, got v_prediction"),
        ({"timestep_spacing": "linspace"}, "timestep_spacing leading or trailing, got linspace"),
        ({"clip_sample": True}, "clip_sample False, got True"),
        ({"thresholding": True}, "thresholding False, got True"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr False, got True"),
        ({"steps_offset": 0}, "steps_offset 1 or set_alpha_to_one True, got neither"),
    ],
)
def test_schedulers_whose_steps_are_not_linear_in_latents_and_noise_are_refused(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^expected a scheduler with {message}"):
        ddim(DDIMScheduler.from_config({**NOISE, **config}))
    with pytest.raises(ValueError, match="got FlowMatchEulerDiscreteScheduler"):
        ddim(FlowMatchEulerDiscreteScheduler())
    levels, timesteps = ddim_schedule(ddim(DDIMScheduler.from_config(NOISE)), 50, torch.device("cpu"), even=False)
    assert timesteps[0] == 981 and len(levels) == 51


@pytest.mark.parametrize(
    ("unet_config", "message"),
    [({"time_cond_proj_dim": 8}, "without time_cond_proj_dim"), ({"in_channels": 9}, "4 channels, got one of 9")],
    ids=["distilled", "inpainting"],
)
def test_models_of_another_kind_are_refused_where_they_are_loaded(
    tmp_path: Path, unet_config: dict[str, Any], message: str
) -> None:
    pipeline = stable_diffusion()
    pipeline.unet = unet(**unet_config)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"^model\.pipeline: .*expected a U-Net .*{message}"):
        policy_of(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rollout.sampler=flow_sde", "rollout.sampler: expected ddim for a StableDiffusionPipeline, got flow_sde"),
        ("model.resolution=[512, 544]", r"model\.resolution: expected multiples of 64, got \[512, 544\]"),
        ("allocation.layers=[16]", r"allocation\.layers: expected indices below 16, got \[16\]"),
        ("rollout.eta=1.5", "rollout.eta: expected at most 1 for the sampler ddim"),
        ("train.kl_scale=std_dev", "train.kl_scale: expected 'variance' or 'velocity' for the sampler ddim"),
    ],
)
def test_settings_that_do_not_suit_a_model_of_noise_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(load_config("sd14_hps", ["model.lora={}", setting]))
    with pytest.raises(ConfigError, match="rollout.sampler: expected flow_sde or dance_sde or cps"):
        plan(load_config("tiny", ["rollout.sampler=ddim"]))


@pytest.mark.skipif(not CLIP_MERGES.is_file(), reason="the public data folder is not there")
@pytest.mark.parametrize("both", [False, True], ids=["sd15", "sdxl"])
def test_units_are_on_the_77_positions_of_clips_own_vocabulary(both: bool) -> None:
    clip = real_clip_tokenizer()
    name = "StableDiffusionXLPipeline" if both else "StableDiffusionPipeline"
    parts = {"tokenizer": clip} | ({"tokenizer_2": clip} if both else {})
    pipeline = type(name, (), parts)()
    text, words = "a photo of a red circle and two triceratops", ("red circle", "triceratops", "triangle")
    units = sk.TextUnits.from_pipeline(pipeline, [text], [list(words)])
    assert units.weights.shape == (1, 77, 3) and units.missing == [["triangle"]]
    encoded = clip(text, padding="max_length", max_length=77, truncation=True).input_ids
    for column, word in enumerate(words[:2]):
        marked = [token for token, weight in zip(encoded, units.weights[0, :, column], strict=True) if weight]
        assert clip.decode(marked).strip() == word


def train(folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[dict[str, Any]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.syspath_prepend(str(TRAINER_TESTS))
    settings = ["tiny", f"run.folder={run}", f"model.pipeline={folder}", *TRAINING, *SETTINGS, *overrides]
    assert star_trainer.cli.main(settings) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "reward/mean" in record]


@pytest.mark.exhaustive
def test_star_in_bfloat16_under_guidance_sees_the_log_probs_of_its_rollouts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["method=star", "model.dtype=bfloat16", "rollout.guidance_scale=3.5", "train.kl_scale=velocity"]
    for record in train(folder, tmp_path, monkeypatch, *POLICY_GRADIENT, *options):
        assert record["train/log_ratio_max"] == 0.0 and record["train/gradient_norm"] > 0.0


@pytest.mark.exhaustive
def test_whole_weights_are_trained_and_exported_as_a_unet(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*POLICY_GRADIENT, "method=uniform", "model.lora=null", "train.learning_rate=1e-4"]
    assert train(folder, tmp_path, monkeypatch, *options)[1]["train/kl"] > 0.0
    trained = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    first = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
    assert trained.keys() == first.keys()
    assert any(not torch.equal(trained[name], first[name]) for name in first)


@pytest.mark.exhaustive
def test_r0_plus_is_guided_by_the_first_model_and_weights_regions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["method=r0_plus", "reward.terms={clip_score: 1.0}", "reward.models.clip=tiny", "r0.allocate=true"]
    options += ["model.levels=even", "rollout.sde_steps=null", "rollout.steps=4"]
    first, second = train(folder, tmp_path, monkeypatch, *options)
    assert first["train/gradient_norm"] > 0.0 and second["train/distance"] > 0.0
