"""What a dry run says, held against a real run's model and against the published sizes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from star_trainer.cli import main
from star_trainer.config import ConfigError, load_config
from star_trainer.dry_run import plan, report
from star_trainer.families.pipelines.sd3 import StableDiffusion3
from star_trainer.families.policy import load_policy

from bench.gpu_model import SD35_MEDIUM as BENCHMARKED

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("overrides", [[], ["model.lora=null"], ["model.lora.rank=4", "model.resolution=[48, 32]"]])
def test_the_plan_has_the_numbers_of_the_loaded_model(overrides: list[str]) -> None:
    config = load_config("tiny", overrides)
    found, policy = plan(config), load_policy(config.model)
    assert found.trainable == sum(parameter.numel() for parameter in policy.trainable().values())
    total = sum(parameter.numel() for parameter in policy.model.parameters())
    assert found.parameters["transformer"] == total - (found.trainable if config.model.lora else 0)
    assert found.parameters["autoencoder"] == sum(p.numel() for p in policy.pipeline.vae.parameters())
    encoders = (policy.pipeline.text_encoder, policy.pipeline.text_encoder_2, policy.pipeline.text_encoder_3)
    assert found.parameters["text encoders"] == sum(p.numel() for encoder in encoders for p in encoder.parameters())
    assert found.latent == policy.latent_shape
    assert found.tokens == policy.grid[0] * policy.grid[1] + policy.encode(["a"]).tensors["text"].shape[1]


@pytest.mark.parametrize("objective", ["clip", "guard"])
def test_calls_are_those_that_a_run_makes(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from star_trainer import train
    from star_trainer.algorithms import policy_gradient
    from star_trainer.families.policy import Policy
    from star_trainer.rewards import terms as rewards
    from star_trainer.sampling import PER_SAMPLE

    config = load_config(
        "tiny",
        [
            *(f"run.folder={tmp_path}", "run.progress=false", "rollout.prompts=3", "rollout.samples=2"),
            *("rollout.batch_size=4", "rollout.steps=3", "rollout.sde_steps=2", "rollout.guidance_scale=2.0"),
            *("train.iterations=1", "train.updates=2", "train.batch_size=2", "train.kl_weight=0.1"),
            *("evaluation.prompts=2", "evaluation.interim_prompts=2", "evaluation.pictures=1", "evaluation.steps=1"),
            *("reward.terms={'dry_run_reward:distinct': 1.0}", f"train.objective={objective}"),
        ],
    )
    found = plan(config)
    calls = {"rollout": 0, "update": 0, "with gradient": 0, "reward": 0}
    inside = ["elsewhere"]
    kept: list[int] = []
    velocity, collect, update = Policy.velocity, policy_gradient.collect, policy_gradient.update

    def counted(self: Policy, *arguments: object) -> torch.Tensor:
        if inside[0] in calls:
            calls[inside[0]] += 1
            calls["with gradient"] += inside[0] == "update" and torch.is_grad_enabled()
        return velocity(self, *arguments)  # type: ignore[arg-type]

    def within(name: str, function):
        def run(*arguments):
            inside[0] = name
            try:
                result = function(*arguments)
                if name == "rollout":
                    trajectory = result.trajectory
                    tensors = [getattr(trajectory, name) for name in PER_SAMPLE]
                    kept.append(sum(tensor.nbytes for tensor in tensors if tensor is not None))
                return result
            finally:
                inside[0] = "elsewhere"

        return run

    def distinct(images, prompts):
        calls["reward"] += inside[0] == "rollout"
        return [float(i) for i in range(len(prompts))]

    monkeypatch.setattr(Policy, "velocity", counted)
    monkeypatch.setattr(policy_gradient, "collect", within("rollout", collect))
    monkeypatch.setattr(policy_gradient, "update", within("update", update))
    monkeypatch.setattr(rewards, "_find", lambda name, models: distinct)
    train.train(config)
    assert calls["rollout"] == found.rollout_calls
    assert calls["update"] == found.update_calls
    assert calls["with gradient"] == found.backward_calls
    assert calls["reward"] == found.reward_calls
    assert found.images == 6
    assert kept == [found.memory.rollout]


def test_sd35_medium_is_known_without_its_files() -> None:
    config = load_config("tiny", [f"model.pipeline={SD35_MEDIUM}", "model.dtype=bfloat16", "model.resolution=512"])
    found = plan(config)
    # As published: 2.2 billion in the transformer, 4.8 in T5, 0.7 and 0.1 in the CLIPs, 84 million in the autoencoder.
    assert found.parameters == pytest.approx(
        {"transformer": 2.24e9, "text encoders": 4.76e9 + 0.69e9 + 0.12e9, "autoencoder": 83.8e6}, rel=0.01
    )
    assert found.latent == (16, 64, 64)


def test_sd35_large_is_known_without_its_files() -> None:
    found = plan(load_config("sd35m_geneval", ["model.pipeline=stabilityai/stable-diffusion-3.5-large"]))
    # As published: 8.1 billion. All attention of 38 blocks but the last one's text output has an adapter.
    assert found.parameters["transformer"] == pytest.approx(8.06e9, rel=0.005)
    assert found.trainable == 32 * 2 * 2432 * (38 * 8 - 1) and found.latent == (16, 64, 64)


def test_the_benchmark_on_a_gpu_measures_the_same_transformer() -> None:
    # It has a copy, because it runs where the trainer's packages are not installed.
    known = StableDiffusion3.published[SD35_MEDIUM]["transformer"]
    assert {**known, "dual_attention_layers": tuple(known["dual_attention_layers"])} == BENCHMARKED


def test_memory_follows_what_it_is_made_of() -> None:
    def memory(*overrides: str):
        return plan(load_config("tiny", list(overrides))).memory

    base = memory()
    assert memory("train.batch_size=24").activations == pytest.approx(base.activations / 2)
    assert memory("model.dtype=bfloat16").weights == pytest.approx(base.weights / 2)
    assert memory("model.gradient_checkpointing=true").activations < base.activations / 3
    assert memory("model.lora=null").trained > 10 * base.trained
    assert base.total == base.weights + base.trained + base.rollout + base.activations
    assert memory("rollout.prompts=24").rollout == pytest.approx(base.rollout * 2)
    assert memory("method=uniform").rollout < base.rollout
    assert memory("rollout.keep_on_host=true").rollout == 0
    # Prompts are encoded while no samples wait and nothing is differentiated.
    assert dataclasses.replace(base, encoders=1e9).total == base.weights + base.trained + 1e9
    one, spread = (plan(load_config("tiny", [f"model.sharded={sharded}"]), 4).memory for sharded in ("false", "true"))
    assert spread.trained == one.trained / 4 and spread.weights < one.weights


def test_the_command_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "--dry-run", f"run.folder={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    for expected in ("trainable parameters  ", "159,744", "images per iteration", "96 (12 prompts x 8)", "MiB"):
        assert expected in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.pipeline=nowhere/at-all", "model.pipeline"),
        ("model.lora.targets=[nothing]", "model.lora.targets"),
        ("model.resolution=30", "model.resolution: expected multiples of 8 up to 64, got 30"),
        ("model.resolution=[48, 30]", "model.resolution: expected multiples of 8 up to 64, got [48, 30]"),
        ("allocation.layers=[99]", "allocation.layers"),
        ("train.clip_range=0.5; train.granularity=position", "train.clip_range"),
    ],
)
def test_what_the_models_do_not_suit_is_refused(override: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        plan(load_config("tiny", override.split("; ")))
    assert main(["tiny", "--dry-run", *override.split("; ")]) == 2
    assert key in capsys.readouterr().err


def test_a_model_that_only_its_name_says_has_no_guidance_refuses_a_scale():
    config = load_config("z_image_pickscore", ["model.pipeline=Tongyi-MAI/Z-Image-Turbo"])
    with pytest.raises(ConfigError, match=r"^rollout\.guidance_scale: expected 1 for a model without guidance, got"):
        plan(config)


def test_a_reward_whose_model_is_not_written_yet_is_named(tmp_path: Path) -> None:
    line = "model not found yet, needed at {}: star-convert-reward hps"
    assert line.format("./rewards/hps") in report(load_config("sd14_hps"))
    assert "parameters, unet" in report(load_config("sd14_hps"))
    assert line.format(tmp_path) not in report(load_config("sd14_hps", [f"reward.models.hps={tmp_path}"]))
