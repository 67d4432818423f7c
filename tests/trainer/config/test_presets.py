"""The presets: they have the published settings, and a dry run needs neither their files nor their weights."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from star_trainer.cli import main
from star_trainer.config import Config, SdeWindow, load_config, preset_names
from star_trainer.dry_run import plan
from star_trainer.families import read_shapes
from star_trainer.families.policy import add_adapter

FULL = ("sd35m_geneval", "sd35m_ocr", "sd35m_pickscore")
FAST = "sd35m_geneval_fast"
# Flow-GRPO's settings (config/grpo.py and config/base.py) in our names.
PUBLISHED = {
    "model.pipeline": "stabilityai/stable-diffusion-3.5-medium",
    "model.resolution": 512,
    "model.max_sequence_length": 128,
    "model.lora.rank": 32,
    "model.lora.alpha": 64,
    "model.vae_dtype": "float32",
    "model.tf32": True,
    "rollout.prompts": 48,
    "rollout.samples": 24,
    "rollout.steps": 10,
    "rollout.shared_noise": False,
    "evaluation.steps": 40,
    "train.learning_rate": 3e-4,
    "train.betas": (0.9, 0.999),
    "train.weight_decay": 1e-4,
    "train.updates": 2,
    "train.max_gradient_norm": 1.0,
    "train.advantage_std": "batch",
    "train.advantage_clip": 5.0,
}
GENEVAL = {"evaluation.prompts": 2212, "reward.terms": {"geneval_flow_grpo": 1.0}}
OWN = {
    "sd35m_geneval": {"train.kl_weight": 0.04, **GENEVAL},
    "sd35m_ocr": {"train.kl_weight": 0.04, "evaluation.prompts": 1018, "reward.terms": {"ocr": 1.0}},
    "sd35m_pickscore": {"train.kl_weight": 0.01, "evaluation.prompts": 2048, "reward.terms": {"pickscore": 1 / 26}},
    FAST: {"train.kl_weight": 0.0, **GENEVAL},
}
FLUX = {
    "flux1_pickscore": {
        "reward.terms": {"pickscore": 1 / 26},
        "evaluation.prompts": 2048,
        "rollout.sampler": "flow_sde",
        "rollout.eta": 0.9,
        "rollout.sde_steps": int(0.99 * 6),
        "train.clip_range": 1e-4,
    },
    "flux1_geneval_fast": {
        **GENEVAL,
        "rollout.sampler": "cps",
        "rollout.eta": 0.8,
        "rollout.sde_window": SdeWindow(size=3, range=(0, 3)),
        "train.clip_range": 1e-5,
    },
}
# pickscore_flux and geneval_flux_fast; adapters and text as in scripts/train_flux.py.
PUBLISHED_FLUX = {
    "model.pipeline": "black-forest-labs/FLUX.1-dev",
    "model.lora.rank": 64,
    "model.lora.alpha": 128,
    "rollout.steps": 6,
    "rollout.guidance_scale": 3.5,
    "evaluation.steps": 28,
    "evaluation.guidance_scale": 3.5,
    "evaluation.every": 30,
    "train.kl_weight": 0.0,
    "train.batch_size": 3,
}
# pickscore_qwenimage of Flow-GRPO and examples/grpo/lora/z_image/default.yaml of Flow-Factory.
QWEN = {
    "qwen_image_pickscore": {
        "model.pipeline": "Qwen/Qwen-Image",
        "rollout.prompts": 32,
        "rollout.eta": 1.2,
        "rollout.guidance_scale": 4.0,
        "rollout.sde_window": SdeWindow(size=2, range=(0, 5)),
        "evaluation.steps": 50,
        "train.advantage_std": "batch",
        "train.ema_decay": 0.0,
    },
    "z_image_pickscore": {
        "model.pipeline": "Tongyi-MAI/Z-Image",
        "rollout.prompts": 48,
        "rollout.eta": 0.7,
        # 4 where 0 is without.
        "rollout.guidance_scale": 1.0 + 4.0,
        "rollout.sde_window": SdeWindow(size=1, range=(1, 4)),
        "evaluation.steps": 40,
        "train.advantage_std": "group",
        # 0.9 at every fourth iteration of two updates.
        "train.ema_decay": round(0.9 ** (1 / 8), 3),
    },
}
PUBLISHED_QWEN = {
    "model.resolution": 512,
    "model.lora.rank": 64,
    "model.lora.alpha": 128,
    "rollout.samples": 16,
    "rollout.steps": 10,
    "rollout.sampler": "flow_sde",
    "reward.terms": {"pickscore": 1 / 26},
    "train.updates": 2,
}
# Flow-Factory's examples/grpo/lora/flux2_klein_base/default.yaml.
KLEIN = {
    "model.pipeline": "black-forest-labs/FLUX.2-klein-base-9B",
    "model.resolution": 384,
    "model.max_sequence_length": 512,
    "model.lora.rank": 64,
    "model.lora.alpha": 128,
    "rollout.prompts": 48,
    "rollout.samples": 16,
    "rollout.steps": 8,
    "rollout.sampler": "flow_sde",
    "rollout.eta": 0.7,
    "rollout.guidance_scale": 4.0,
    "rollout.sde_window": SdeWindow(size=1, range=(1, 4)),
    "evaluation.steps": 28,
    "evaluation.guidance_scale": 4.0,
    "train.updates": 2,
    "train.batch_size": 1,
    "train.clip_range": 1e-4,
    "train.kl_weight": 0.0,
    "train.learning_rate": 3e-4,
    "train.betas": (0.9, 0.999),
    "train.weight_decay": 1e-4,
    "train.max_gradient_norm": 1.0,
    "train.advantage_std": "group",
    "train.advantage_clip": 5.0,
}
FULL_STEPS = {
    "rollout.sampler": "flow_sde",
    "rollout.eta": 0.7,
    "rollout.guidance_scale": 4.5,
    "rollout.sde_window": None,
    "evaluation.guidance_scale": 4.5,
    "train.clip_range": 1e-4,
    "train.kl_scale": "std_dev",
    "train.old_log_prob": "recompute",
}
FAST_STEPS = {
    "rollout.sampler": "cps",
    "rollout.eta": 0.8,
    "rollout.guidance_scale": 1.0,
    "rollout.sde_steps": None,
    "rollout.sde_window": SdeWindow(size=3, range=(0, 5)),
    "evaluation.guidance_scale": 1.0,
    "train.clip_range": 1e-5,
    "train.old_log_prob": "recompute",
    "train.step_fraction": 1.0,
}


def setting(config: Config, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, on a machine without a network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was to be made")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


@pytest.mark.parametrize("name", OWN)
def test_a_preset_has_the_published_settings(name: str) -> None:
    config = load_config(name)
    expected = PUBLISHED | OWN[name] | (FAST_STEPS if name == FAST else FULL_STEPS)
    assert {key: setting(config, key) for key in expected} == expected
    assert config.method == "star" and config.units.source == "rules"


@pytest.mark.parametrize("name", FLUX)
def test_a_preset_of_flux_has_the_published_settings(name: str) -> None:
    config = load_config(name)
    expected = PUBLISHED | PUBLISHED_FLUX | FLUX[name]
    assert {key: setting(config, key) for key in expected} == expected
    assert config.method == "star" and config.units.source == "rules" and config.train.old_log_prob == "recompute"


@pytest.mark.parametrize(
    ("name", "transformer", "encoder", "tokens"),
    # As published: twenty billion behind Qwen2.5-VL 7B, and six behind Qwen3 4B.
    [
        ("qwen_image_pickscore", 20_430_401_088, 8_292_166_656, 1024 + 128),
        ("z_image_pickscore", 6_154_908_736, 4_022_468_096, 1024 + 512),
    ],
)
def test_presets_of_qwen_image_and_z_image_have_the_published_settings_and_run_dry_without_files(
    name: str, transformer: int, encoder: int, tokens: int, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(name)
    expected = PUBLISHED_QWEN | QWEN[name]
    assert {key: setting(config, key) for key in expected} == expected
    assert config.method == "star" and config.units.source == "rules" and config.train.old_log_prob == "recompute"
    assert config.evaluation.guidance_scale == config.rollout.guidance_scale
    assert main([name, "--dry-run", "--processes", "8"]) == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    printed = {key: value.strip() for key, value in printed.items()}
    assert printed["parameters, transformer"] == f"{transformer:,}"
    assert printed["parameters, text encoders"] == f"{encoder:,}"
    assert printed["latent"] == f"16 x 64 x 64; {tokens:,} tokens, text included"
    assert not list(nowhere.iterdir())


@pytest.mark.parametrize("name", FLUX)
def test_a_dry_run_of_flux_needs_no_files_no_weights_and_no_network(
    name: str, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--dry-run", "--processes", "32"]) == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    printed = {key: value.strip() for key, value in printed.items()}
    assert printed["parameters, transformer"] == "11,901,408,320"
    # Rank 64 on the attention of 57 blocks and on the dual ones' feed-forward layers.
    assert printed["trainable parameters"] == f"{64 * (19 * 8 * 2 * 3072 + 38 * 3 * 2 * 3072 + 19 * 4 * 5 * 3072):,}"
    assert printed["latent"] == "16 x 64 x 64; 1,152 tokens, text included"
    # Guidance is an input: 5 batches of 36 samples by six steps; 2 updates of 6 batches of 3 by the trained steps,
    # once more for the old log-probs.
    steps = 5 if name == "flux1_pickscore" else 3
    assert printed["model calls, rollout"].startswith("30 of up to 8 samples on each of 32")
    assert printed["model calls, update"].startswith(f"{12 * steps * 2} on each of 32 processes, {12 * steps} of")
    assert not list(nowhere.iterdir())


def test_the_preset_of_flux2_klein_has_the_published_settings_and_runs_dry(
    nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("flux2_klein_pickscore")
    assert {key: setting(config, key) for key in KLEIN} == KLEIN
    assert config.train.ema_decay == pytest.approx(0.9 ** (1 / (4 * 2)), abs=2e-4)
    assert main(["flux2_klein_pickscore", "--dry-run", "--processes", "8"]) == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    printed = {key: value.strip() for key, value in printed.items()}
    assert printed["latent"] == "128 x 24 x 24; 1,088 tokens, text included"
    # 12 batches of 8 by eight steps; 2 updates of 48 samples at one step, and for the old log-probs; all guided.
    assert printed["model calls, rollout"].startswith("192 of up to 8 samples on each of 8")
    assert printed["model calls, update"].startswith("384 on each of 8 processes, 96 of")
    assert not list(nowhere.iterdir())


@pytest.mark.parametrize("name", FULL)
def test_as_many_steps_are_trained_on_as_there(name: str) -> None:
    config = load_config(name)
    assert config.rollout.sde_steps == int(0.99 * config.rollout.steps) and config.train.step_fraction == 1.0


@pytest.mark.parametrize(("presets", "batches"), [(OWN, 2), (FLUX, 6)], ids=["sd35m", "flux1"])
def test_the_average_decays_as_one_that_is_moved_in_every_batch_of_every_eighth_update(
    presets: dict[str, object], batches: int
) -> None:
    """Flow-GRPO's wrapper, counted: asked after each of an update's `batches` on 32 GPUs."""
    kept, updates, skipped_start = 1.0, 0, 100
    for batch in range(batches * 2000):
        updates += batch % batches == batches - 1
        if (updates + 1) % 8 == 0 and updates > skipped_start:
            kept *= 0.9
    for name in presets:
        assert load_config(name).train.ema_decay == pytest.approx(kept ** (1 / (updates - skipped_start)), abs=4e-4)


@pytest.mark.parametrize(
    ("targets", "layers", "parameters"),
    [
        ("the preset's", 191, 18_776_064),
        # The second attention of the first thirteen blocks as well: what this package trained before.
        ("to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out", 243, 23_887_872),
    ],
)
def test_adapters_are_where_the_published_ones_are(targets: str, layers: int, parameters: int) -> None:
    config = load_config("sd35m_geneval", [] if "preset" in targets else [f"model.lora.targets={targets.split()}"])
    family, shapes = read_shapes(config.model.pipeline)
    with torch.device("meta"):
        transformer, _ = family.build_models(shapes)
    add_adapter(transformer, config.model, family)
    adapters = {name: weight for name, weight in transformer.named_parameters() if ".lora_" in name}
    assert len(adapters) == 2 * layers and sum(weight.numel() for weight in adapters.values()) == parameters
    assert any(".attn2." in name for name in adapters) == (layers == 243)


@pytest.mark.parametrize("name", OWN)
def test_a_dry_run_needs_no_files_no_weights_and_no_network(
    name: str, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--dry-run", "--processes", "8"]) == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    printed = {key: value.strip() for key, value in printed.items()}
    assert printed["parameters, transformer"] == "2,243,171,520"
    assert printed["trainable parameters"] == "18,776,064"
    assert printed["images per iteration"] == "1,152 (48 prompts x 24), 144 on each of 8 processes"
    # 9 batches of 16 by 10 steps; 2 updates of 9 batches of 8, by the trained steps, once more for the old log-probs;
    # but for the fast one guided, which is two calls each, and the KL twice more.
    rollout = "90" if name == FAST else "180"
    assert printed["model calls, rollout"].startswith(f"{rollout} of up to 16 samples on each of 8")
    update = "108 on each of 8 processes, 54" if name == FAST else "972 on each of 8 processes, 162"
    assert printed["model calls, update"].startswith(update)
    assert printed["reward calls"] == "9 on each of 8 processes"
    assert "GiB on each of 8 processes: frozen weights " in printed["estimated GPU memory"]
    assert printed["prompts, training"].startswith("not found yet, needed at flow_grpo/dataset/")
    assert "git clone" in printed["prompts come from"]
    assert not list(nowhere.iterdir())


@pytest.mark.parametrize("name", OWN)
def test_a_run_without_the_prompts_says_where_they_come_from(
    name: str, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("star-train: prompts.source: no such file: flow_grpo/dataset/")
    assert "git clone https://github.com/yifan123/flow_grpo" in error and error.count("\n") == 1


def test_the_optimisation_does_not_depend_on_the_number_of_processes() -> None:
    config = load_config("sd35m_geneval")
    for processes, images in ((1, 1152), (8, 144), (32, 36), (100, 12)):
        found = plan(config, processes)
        assert found.images == 48 * 24
        assert found.reward_calls == -(-images // config.rollout.batch_size)


def test_groups_are_spread_over_processes_that_they_do_not_go_into(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sd35m_ocr", "--dry-run", "--processes", "32"]) == 0
    assert "1,152 (48 prompts x 24), 36 on each of 32 processes" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "two"])
def test_no_number_of_processes_is_refused(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tiny", "--dry-run", "--processes", number])
    assert "--processes" in capsys.readouterr().err


def test_prompts_that_are_there_are_counted_and_checked(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nowhere / "flow_grpo" / "dataset" / "geneval"
    folder.mkdir(parents=True)
    good = json.dumps({"prompt": "a bench", "include": [{"class": "bench", "count": 1}], "units": ["bench"]}) + "\n"
    (folder / "train_metadata.jsonl").write_text(good * 3)
    assert main(["sd35m_geneval", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "3 in flow_grpo/dataset/geneval/train_metadata.jsonl" in printed and "test_metadata.jsonl" in printed
    (folder / "test_metadata.jsonl").write_text(good * 2)
    assert main(["sd35m_geneval", "--dry-run", "units=file"]) == 0
    assert "test_metadata.jsonl, 2 with units" in capsys.readouterr().out
    (folder / "test_metadata.jsonl").write_text(good + '{"prompt": "a cat"}\n')
    assert main(["sd35m_geneval", "--dry-run"]) == 2
    assert "prompts.held_out: flow_grpo/dataset/geneval/test_metadata.jsonl: 1 of 2" in capsys.readouterr().err
    (folder / "train_metadata.jsonl").write_text("{")
    assert main(["sd35m_geneval", "--dry-run"]) == 2
    assert "line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.terms.geneval_grade=1", "did you mean geneval_graded?"),
        ("reward.terms.nowhere:reward=1", "'nowhere:reward' cannot be used"),
        ("reward.terms.remote=1", "reward.remote.url"),
        ("reward.terms.ocr=1", "prompts.source: scenes: 1 of 1 prompts do not suit the reward ocr"),
        ("model.pipeline=./nowhere", "model.pipeline: no such folder: ./nowhere"),
        ("model.pipeline=a/b/c", "model.pipeline: no such folder: a/b/c"),
    ],
)
def test_a_dry_run_checks_rewards_prompts_and_folders(
    override: str, message: str, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tiny", "--dry-run", override]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_checks_the_backend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["tiny", "--dry-run", "backend=triton"]) == 2
    assert "backend='triton'" in capsys.readouterr().err


def test_sizes_are_in_the_unit_that_suits_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "--dry-run"]) == 0
    (line,) = (entry for entry in capsys.readouterr().out.splitlines() if entry.startswith("estimated"))
    assert "MiB" in line and "GiB" not in line and " 0 MiB" not in line


def test_all_presets_are_tested_here() -> None:
    others = {"tiny", "tiny_pickscore", "tiny_r0", "sd3m_r0", "sd14_hps", "sd15_r0"}
    assert set(preset_names()) == {*others, *OWN, *FLUX, *QWEN, "flux2_klein_pickscore"}


def test_stable_diffusion_on_hps_has_the_published_settings(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("sd14_hps")
    # DanceGRPO's on eight GPUs: 4 prompts of 16 samples on each, steps of 8 batches of 4.
    expected = {
        "model.pipeline": "CompVis/stable-diffusion-v1-4",
        "model.dtype": "bfloat16",
        "model.tf32": True,
        "model.lora": None,
        "rollout.prompts": 8 * 4,
        "rollout.samples": 16,
        "rollout.steps": 50,
        "rollout.sde_steps": int((50 - 1) * 1.0),
        "rollout.sampler": "ddim",
        "rollout.eta": 1.0,
        "rollout.guidance_scale": 5.0,
        "rollout.shared_noise": True,
        "reward.terms": {"hps": 1.0},
        "train.iterations": 300,
        "train.updates": 8 * 4 * 16 // (8 * 8 * 4),
        "train.batch_size": 4,
        "train.step_fraction": 1.0,
        "train.clip_range": 1e-4,
        "train.kl_weight": 0.0,
        "train.learning_rate": 1e-5,
        "train.betas": (0.9, 0.999),
        "train.weight_decay": 1e-4,
        "train.max_gradient_norm": 1.0,
        "train.advantage_std": "group",
        "train.advantage_clip": 5.0,
    }
    assert {key: setting(config, key) for key in expected} == expected
    assert main(["sd14_hps", "--dry-run", "--processes", "8"]) == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    printed = {key: value.strip() for key, value in printed.items()}
    assert printed["trainable parameters"] == printed["parameters, unet"] == "859,520,964"
    assert printed["method"] == "star, ddim, rewards hps"
    # 49 steps of 16 batches, each a backward pass; without the prompt too, and once more for the old log-probs.
    assert printed["model calls, update"].startswith(f"{49 * 16 * 4:,} on each of 8 processes, {49 * 16:,} of")
    assert not list(nowhere.iterdir())


@pytest.mark.parametrize(
    ("name", "transformer", "rewarded"),
    # As published; an image at a time, and four.
    [("sd3m_r0", "2,028,328,000", 8), ("sd15_r0", "859,520,964", 2)],
)
def test_r0_starts_from_the_papers_models(
    name: str, transformer: str, rewarded: int, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(name)
    assert config.method == "r0" and config.rollout.steps == config.evaluation.steps == 4
    assert config.model.levels == "even"
    assert main([name, "--dry-run", "--processes", "8"]) == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    printed = {key: value.strip() for key, value in printed.items()}
    assert printed["parameters, unet" if name == "sd15_r0" else "parameters, transformer"] == transformer
    # Eight images in two batches, four steps, each run once to sample and once for its gradient.
    assert printed["model calls, rollout"].startswith("8 of up to 4 samples on each of 8")
    assert printed["model calls, update"].startswith("8 on each of 8 processes, 8")
    assert list(config.reward.terms) == ["hps", "image_reward", "clip_score"]
    assert printed["reward calls"] == f"{3 * rewarded} on each of 8 processes"
    assert not list(nowhere.iterdir())
