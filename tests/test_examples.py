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


def test_star_in_verl_omni_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verl_omni", None)
    with pytest.raises(ImportError, match="needs verl-omni"):
        run(monkeypatch, "verl_omni/star_sd3.py")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("sde_type", "kind"), [("sde", "flow_sde"), ("cps", "cps"), ("dance_sde", "dance_sde")])
def test_star_in_verl_omni_has_the_loss_of_policy_loss(
    monkeypatch: pytest.MonkeyPatch, sde_type: str, kind: str
) -> None:
    pytest.importorskip("verl_omni", reason="verl-omni is not installed")
    import functools

    import numpy as np
    from diffusers import StableDiffusion3Pipeline
    from star_trainer.config.paths import TINY_PIPELINE
    from star_trainer.prompts.units.rules import units_by_rule
    from tensordict import TensorDict
    from verl import DataProto
    from verl.utils import tensordict_utils
    from verl_omni.pipelines.sd3_flow_grpo import diffusers_training_adapter
    from verl_omni.pipelines.utils import build_scheduler
    from verl_omni.workers.config import diffusion as settings
    from verl_omni.workers.engine.fsdp import diffusers_impl
    from verl_omni.workers.utils.losses import diffusion_loss
    from verl_omni.workers.utils.padding import embeds_padding_2_no_padding

    import star_kernels as sk

    prompts, steps, guidance = ["a photo of a red circle", "a photo of a blue square above a red cross"], 3, 2.0
    monkeypatch.syspath_prepend(EXAMPLES / "verl_omni")
    monkeypatch.setattr(diffusers_training_adapter, "get_device_name", lambda: "cpu")
    monkeypatch.setattr(diffusers_impl, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(diffusers_impl, "device_name", "cpu")
    pipeline = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": guidance}
    tokenizers = {"clip": {"path": "tokenizer", "max_length": 16}, "t5": {"path": "tokenizer_3", "max_length": 256}}
    model_config = settings.DiffusionModelConfig(
        path=str(TINY_PIPELINE), algorithm="flow_grpo", external_lib="star_sd3", attn_backend="native",
        extra_tokenizers=tokenizers, pipeline=settings.DiffusionPipelineConfig(**pipeline),
        algo=settings.DiffusionRolloutAlgoConfig(noise_level=0.7, sde_type=sde_type),
    )  # fmt: skip
    loss_config = settings.DiffusionLossConfig(clip_ratio=2e-3)
    actor_config = settings.FSDPDiffusionActorConfig(
        ppo_micro_batch_size_per_gpu=2, rollout_n=1, diffusion_loss=loss_config
    )

    # What vLLM-Omni would have sampled.
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY_PIPELINE, torch_dtype=torch.float32)
    scheduler, generator = build_scheduler(model_config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        text, no_text, pooled, no_pooled = pipe.encode_prompt(prompts, None, None)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        given = ((text, pooled), (no_text, no_pooled))
        v, empty = (pipe.transformer(x, *each, t.expand(2), return_dict=False)[0] for each in given)
        return empty + guidance * (v - empty)

    latents, times = [torch.randn(2, 4, 16, 16, generator=generator)], scheduler.timesteps[:steps]
    for t in times:
        given = {"timestep": t.expand(2), "generator": generator, "noise_level": 0.7, "sde_type": sde_type}
        with torch.no_grad():
            latents.append(scheduler.sample_previous_step(latents[-1], velocity(latents[-1], t), **given)[0])
    rollout = {"all_latents": torch.stack(latents, 1), "all_timesteps": times.expand(2, -1), "prompt_embeds": text}
    rollout |= {"negative_prompt_embeds": no_text, "pooled_prompt_embeds": pooled}
    rollout |= {"negative_pooled_prompt_embeds": no_pooled}
    rollout |= {f"{name}_embeds_mask": torch.ones(2, text.shape[1]) for name in ("prompt", "negative_prompt")}
    chats = np.empty(2, dtype=object)
    chats[:] = [[{"role": "user", "content": prompt}] for prompt in prompts]

    engine = object.__new__(diffusers_impl.PPODiffusersFSDPEngine)  # without its groups of processes
    monkeypatch.setattr(type(engine), "get_data_parallel_group", lambda self: None)
    engine.module, engine.scheduler, engine.model_config = pipe.transformer, scheduler, model_config
    engine.ulysses_sequence_parallel_size, engine.use_ulysses_sp = 1, False

    def passes(loss: Any = None, **more: torch.Tensor) -> dict[str, Any]:
        """A worker's pass over the batch as the driver sends it."""
        data = embeds_padding_2_no_padding(
            DataProto(TensorDict(rollout | more, batch_size=2), {"raw_prompt": chats}).to_tensordict()
        )
        tensordict_utils.assign_non_tensor(data, micro_batch_size_per_gpu=2)
        return engine.forward_backward_batch(data, loss, forward_only=loss is None)

    def gradient() -> torch.Tensor:
        found = torch.cat(
            [weight.grad.flatten() for weight in pipe.transformer.parameters() if weight.grad is not None]
        )
        pipe.transformer.zero_grad()
        return found

    pipe.transformer.enable_gradient_checkpointing()
    old = passes()["model_output"]["log_probs"]
    assert old.shape == (2, steps, 2, 16, 16)
    units = sk.TextUnits.from_pipeline(pipe, prompts, [units_by_rule(prompt) for prompt in prompts])
    with torch.no_grad(), sk.record_attention(pipe.transformer, units, record_pass=0) as recorder:
        velocity(latents[-2], times[-1])
    maps = sk.allocation_map(recorder.mass, (8, 8)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(old[:, -1, 1], maps)

    advantage, clip_range = torch.tensor([1.5, -0.5]), sk.position_clip_range(loss_config.clip_ratio, 16, 16)
    given = {"old_log_probs": old, "advantages": advantage[:, None].expand(2, steps)}
    for scale in (1.0, 1.02):  # the policy that sampled, and one that has gone on until ratios are clipped
        with torch.no_grad():
            pipe.transformer.proj_out.weight.mul_(scale)
        output = passes(functools.partial(diffusion_loss, actor_config), **given)
        theirs = gradient()
        ratios, clipped = (output["metrics"][f"actor/{name}"].values for name in ("ratio_mean", "pg_clipfrac"))
        assert ratios == [1.0] * steps if scale == 1.0 else max(clipped) > 0.0
        for step, t in enumerate(times):
            with sk.record_attention(pipe.transformer, None):
                v = velocity(latents[step], t)
            levels = scheduler.sigmas[step : step + 2]
            row = sk.transition_coefficients(kind, *levels, eta=0.7, sigma_max=scheduler.sigmas[1])
            log_prob, weights = old[:, step].unbind(1)
            latent = latents[step : step + 2]
            result = sk.policy_loss(v, *latent, log_prob, advantage, row, weights=weights, clip_range=clip_range)
            (result.loss / steps).backward()
            assert output["loss"][0][step] * steps == pytest.approx(result.loss.item(), abs=1e-5)
            assert clipped[step] == pytest.approx(float(result.metrics["clip_fraction"]), abs=2 / 512)
        ours = gradient()
        assert float((theirs - ours).norm() / ours.norm()) < 5e-4  # 1e-4 for CPS, whose mean is rounded elsewhere
