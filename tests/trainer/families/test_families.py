"""What every family of models keeps, each on a random small pipeline of the real classes that is saved to disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import star_trainer.cli
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from star_trainer.config import ConfigError, load_config
from star_trainer.dry_run import plan
from star_trainer.families.policy import Policy, load_policy
from star_trainer.prompts import Prompt
from star_trainer.run.randomness import stream
from star_trainer.sampling import denoise, text_units
from star_trainer.studies import units
from star_trainer.studies.cost import cli as cost
from star_trainer.studies.evaluate import cli as evaluation
from torch import Tensor

from tests.tiny_models import WORDS
from tests.trainer.families.small_pipelines import PIPELINES, SmallPipeline

PROMPT = "a red circle and a blue square"
STEPS = 3
TRAINING = [
    *("run.progress=false", "run.trackers=[]", "model.lora.targets=null"),
    *("rollout.prompts=2", "rollout.samples=2", "rollout.batch_size=4", f"rollout.steps={STEPS}"),
    *("rollout.sde_steps=2", "train.iterations=2", "train.updates=1", "train.batch_size=4"),
    *("train.learning_rate=1e-2", "train.ema_decay=0.0", "evaluation.prompts=2", "evaluation.interim_prompts=2"),
    *(f"evaluation.steps={STEPS}", "evaluation.pictures=2"),
]
POLICY_GRADIENT = [*TRAINING, "train.kl_weight=0.01", "reward.terms={'reward_for_tests:brightness': 1.0}"]

TRAINER_TESTS = Path(__file__).parents[1]

MadeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(autouse=True)
def rewards_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.syspath_prepend(str(TRAINER_TESTS))


@pytest.fixture(scope="session", params=PIPELINES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def small(name: str) -> SmallPipeline:
    return PIPELINES[name]


@pytest.fixture(scope="session")
def folder(name: str, made_once: MadeOnce) -> Path:
    return made_once(f"pipeline_{name}", PIPELINES[name].save)


@pytest.fixture(scope="session")
def settings(small: SmallPipeline, folder: Path) -> list[str]:
    """Those that say which pipeline, at the first of its resolutions."""
    height, width = small.resolutions[0]
    length = f"model.max_sequence_length={small.length}"
    return [f"model.pipeline={folder}", f"model.resolution=[{height}, {width}]", length, *small.settings]


@pytest.fixture(scope="session")
def star(name: str, settings: list[str], made_once: MadeOnce) -> Path:
    """The folder of two iterations of STAR in float32."""

    def train(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(TRAINER_TESTS))
            run(folder, settings, *POLICY_GRADIENT, "method=star")

    return made_once(f"star_{name}", train)


def load(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(folder: Path, settings: list[str], *overrides: str) -> None:
    """Train by star-train itself."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert star_trainer.cli.main(["tiny", f"run.folder={folder}", *settings, *overrides]) == 0


def iterations(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "reward/mean" in record]


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def load_policy_with(settings: list[str], *overrides: str) -> Policy:
    return load_policy(load_config("tiny", [*settings, *TRAINING, *overrides]).model)


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_denoising_without_noise_is_the_pipelines_own_sampling(
    small: SmallPipeline, settings: list[str], folder: Path, guided: bool
) -> None:
    if guided and small.guidance_scale == 1.0:
        pytest.skip("a model without guidance")
    pipeline, scale = load(folder), small.guidance_scale if guided else 1.0
    for size in small.resolutions[:2]:
        policy = load_policy_with(settings, f"model.resolution={list(size)}")
        noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        options = {"steps": STEPS, "kind": "ode", "generator": torch.Generator(), "guidance_scale": scale}
        found = denoise(policy, policy.encode([PROMPT]), initial=noise, **options).latents[-1]
        expected = small.sample(pipeline, PROMPT, noise, size, STEPS, scale)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert float((found - noise).std()) > 0.05
        image = small.draw(pipeline, PROMPT, noise, size, STEPS, scale)
        assert image.shape == (*size, 3)
        np.testing.assert_allclose(policy.decode(found)[0] / 255.0, image, atol=0.51 / 255 + 1e-3)


def test_maps_are_on_the_grid_of_the_tokens_and_the_plan_counts_those_of_the_loaded_model(
    small: SmallPipeline, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("tiny", [*settings, *POLICY_GRADIENT])
    policy, prompts = load_policy(config.model), [Prompt(PROMPT, {}, ("red circle", "blue square"))]
    conditioning, named = policy.encode([PROMPT]), text_units(policy, prompts)
    options = {"steps": 2, "kind": "ode", "generator": torch.Generator().manual_seed(0)}
    maps = denoise(policy, conditioning, units=named, allocation=config.allocation, **options).weights
    assert maps is not None and maps.shape == (2, 1, *policy.grid) and named.missing == [[]]
    torch.testing.assert_close(maps.mean((-2, -1)), torch.ones(2, 1))
    assert float(maps.std()) > 1e-4
    found = plan(config)
    assert found.latent == policy.latent_shape and found.latent[1] != found.latent[2]
    assert found.tokens == policy.grid[0] * policy.grid[1] + named.weights.shape[1]
    assert found.trainable == sum(value.numel() for value in policy.trainable().values())
    assert found.parameters[policy.family.model_part] == sum(
        value.numel() for name, value in policy.model.named_parameters() if "lora_" not in name
    )
    assert star_trainer.cli.main(["tiny", *settings, *POLICY_GRADIENT, "--dry-run"]) == 0
    assert f"{found.tokens:,} tokens" in capsys.readouterr().out


def test_a_resolution_that_the_family_cannot_take_names_its_step(small: SmallPipeline, settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"model\.resolution: expected multiples of \d+.* got \[\d+, \d+\]"):
        plan(load_config("tiny", [*settings, *TRAINING, f"model.resolution={list(small.resolutions[2])}"]))


@torch.no_grad()
def test_units_mark_the_very_tokens_of_the_conditioning_that_change_with_their_words(settings: list[str]) -> None:
    policy = load_policy_with(settings)
    for part in policy.family.encoder_parts:
        for module_name, module in getattr(policy.pipeline, part).named_modules():
            # Without their attention encoders make of each token what its word and place alone say.
            if module_name.endswith((".o", ".out_proj", ".o_proj")):
                for value in module.parameters():
                    value.zero_()
    (before, marked), all_changed = tokens(policy, PROMPT, "circle"), False
    for word in WORDS:
        after, place = tokens(policy, PROMPT.replace("circle", word), word)
        # As many tokens as the word before it; spelt by letters, some may be the same.
        if torch.equal(place, marked):
            changed = (after != before).any(-1)
            assert not (changed & ~marked).any()
            all_changed |= torch.equal(changed, marked)
    assert all_changed


def tokens(policy: Policy, text: str, unit: str) -> tuple[Tensor, Tensor]:
    """What the model is told of each text token [N, D], and which are the unit's [N]."""
    units = policy.text_units([text], [[unit]])
    return policy.encode([text]).tensors["text"][0], units.weights[0, :, 0] > 0


def test_star_trains_on_its_own_rollouts(star: Path) -> None:
    first, second = iterations(star)
    assert [first["iteration"], second["iteration"]] == [1, 2]
    for record in (first, second):
        assert record["train/log_ratio_max"] == 0.0 and record["train/gradient_norm"] > 0.0
    assert first["train/kl"] == 0.0 < second["train/kl"]
    assert (star / "allocation_maps.png").is_file()


@pytest.mark.parametrize("method", ["star", pytest.param("uniform", marks=pytest.mark.exhaustive)])
def test_training_in_bfloat16_under_guidance_sees_the_log_probs_of_its_rollouts(
    method: str, small: SmallPipeline, settings: list[str], tmp_path: Path
) -> None:
    precision = ["model.dtype=bfloat16", "model.gradient_checkpointing=true"]
    run(
        tmp_path,
        settings,
        *POLICY_GRADIENT,
        f"method={method}",
        *precision,
        f"rollout.guidance_scale={small.guidance_scale}",
    )
    for record in iterations(tmp_path):
        assert record["train/log_ratio_max"] == 0.0 and record["train/gradient_norm"] > 0.0
    assert any(float(value.abs().max()) > 0.0 for name, value in adapter(tmp_path).items() if "lora_B" in name)


@pytest.mark.parametrize("lora", ["{rank: 2, alpha: 2}", "null"], ids=["adapters", "all weights"])
def test_whatever_is_trained_gets_a_gradient(lora: str, settings: list[str]) -> None:
    """As several processes need it, which wait for each other's."""
    untargeted = [setting for setting in TRAINING if not setting.startswith("model.lora")]
    policy = load_policy(load_config("tiny", [*settings, *untargeted, f"model.lora={lora}"]).model)
    noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    prediction = policy.predict(noise, policy.schedule(STEPS)[1][0], policy.encode([PROMPT]), None)
    prediction.velocity.square().mean().backward()
    trained = policy.trainable()
    assert trained and [name for name, parameter in trained.items() if parameter.grad is None] == []


@pytest.mark.exhaustive
def test_r0_trains_through_the_decoder(small: SmallPipeline, settings: list[str], tmp_path: Path) -> None:
    if not small.r0:
        pytest.skip("a decoder without gradients")
    reward = ["reward.terms={clip_score: 1.0}", "reward.models.clip=tiny", "method=r0", "rollout.sde_steps=null"]
    run(tmp_path, settings, *TRAINING, *reward)
    first, second = iterations(tmp_path)
    assert first["train/gradient_norm"] > 0.0 and second["train/gradient_norm"] > 0.0
    assert any(float(value.abs().max()) > 0.0 for name, value in adapter(tmp_path).items() if "lora_B" in name)


@pytest.mark.exhaustive
def test_a_run_that_was_stopped_goes_on_bit_for_bit(star: Path, settings: list[str], tmp_path: Path) -> None:
    run(tmp_path, settings, *POLICY_GRADIENT, "method=star", "train.iterations=1")
    once = adapter(tmp_path)
    run(tmp_path, settings, *POLICY_GRADIENT, "method=star")
    expected, found = adapter(star), adapter(tmp_path)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert any(not torch.equal(once[key], found[key]) for key in found)


def test_the_adapter_gives_the_trainers_pictures_in_diffusers(
    small: SmallPipeline, folder: Path, star: Path, tmp_path: Path
) -> None:
    options = ["--count", "1", "--samples", "1", "--rewards", "scene_graded", "--out", str(tmp_path)]
    assert evaluation.main([str(star), *options, f"evaluation.guidance_scale={small.guidance_scale}"]) == 0
    pictures = {model: read(tmp_path / model / "00000" / "samples" / "0000.png") for model in ("base", "adapter")}
    prompt = json.loads((tmp_path / "base" / "00000" / "metadata.jsonl").read_text())["prompt"]
    size, pipeline, shape = small.resolutions[0], load(folder), plan(load_config(str(star / "config.json"))).latent
    noise = torch.randn(1, *shape, generator=stream(0, "star-eval", 0, 0))
    for model in ("base", "adapter"):
        if model == "adapter":
            pipeline.load_lora_weights(star / "adapter", weight_name="pytorch_lora_weights.safetensors")
        drawn = small.draw(pipeline, prompt, noise, size, STEPS, small.guidance_scale)
        np.testing.assert_allclose(np.round(drawn * 255.0), pictures[model], atol=1)
    assert np.abs(pictures["base"] - pictures["adapter"]).max() > 3


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(float)


def test_units_are_found_by_the_command(
    small: SmallPipeline, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPT)
    options = ["--pipeline", str(folder), "--max-sequence-length", str(small.length)]
    assert units.main([str(tmp_path / "prompts.txt"), *options]) == 0
    assert "found in the token sequence: 2 of 2" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_a_rollouts_cost_is_counted_and_measured(settings: list[str], tmp_path: Path) -> None:
    options = ["--seconds", "0.1", "--parts", "rollout", "--folder", str(tmp_path)]
    assert cost.main(["tiny", *settings, *POLICY_GRADIENT, *options]) == 0
    (group,) = json.loads((tmp_path / "cost.json").read_text())["parts"]["rollout"]["groups"]
    members = {f"{member['method']}, {member['variant']}": member for member in group["members"]}
    assert all(member["flops"] > 0 and member["seconds"]["median"] > 0.0 for member in members.values())
    assert members["star, fused"]["flops"] > members["uniform, fused"]["flops"]
