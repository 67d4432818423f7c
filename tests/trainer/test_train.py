"""The loop: it runs to its end, survives SIGKILL bit for bit, and does not go on with NaN."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import accelerate.tracking
import numpy as np
import pytest
import star_trainer.algorithms.policy_gradient as update_module
import star_trainer.train as loop
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from filelock import FileLock
from safetensors.torch import load_file
from star_trainer.cli import main
from star_trainer.config import ConfigError, load_config
from star_trainer.families import devices
from star_trainer.families.adapters import read_adapter
from star_trainer.families.pipelines.sd3 import StableDiffusion3
from star_trainer.rewards import terms
from star_trainer.run.checkpoint import CheckpointError
from star_trainer.run.statistics import paired_difference
from star_trainer.sampling import NonFiniteError
from star_trainer.studies.export import main as export_main
from star_trainer.train import train

from tests.trainer import kill_run
from tests.trainer.forked import run_forked

SMALL = [
    "run.progress=false",
    "train.iterations=4",
    "train.step_fraction=1.0",
    "train.batch_size=4",
    "train.kl_weight=0.01",
    "rollout.prompts=2",
    "rollout.samples=4",
    "rollout.batch_size=8",
    # Both kinds of steps, as in the preset.
    "rollout.steps=3",
    "rollout.sde_steps=2",
    "evaluation.prompts=4",
    "evaluation.interim_prompts=4",
    "evaluation.steps=2",
    "evaluation.every=2",
    "evaluation.pictures=2",
    "checkpoints.every=1",
    # Rewards of so few and so coarse samples often have no spread, and a run that updates nothing shows nothing.
    "reward.terms={'reward_for_tests:brightness': 1.0}",
]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # A process has one accelerate state, and these tests use several precisions.
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(before)


def run(folder: Path, *overrides: str) -> dict[str, object]:
    return train(load_config("tiny", [f"run.folder={folder}", *SMALL, *overrides]))


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("iteration_*"))
    return {
        f"{name}/{key}": tensor
        for name in ("policy", "average", "optimizer")
        for key, tensor in load_file(newest / f"{name}.safetensors").items()
    }


def shown_in_report(folder: Path) -> dict:
    """The images and maps of a run's page, which has its curves too."""
    content = (folder / "report.html").read_text(encoding="utf-8")
    assert "4 of 4" in content and "Gradient norm" in content
    return json.loads(re.search(r'id="data">(.*?)</script>', content)[1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        torch.set_num_threads(1)
        # Made before the fixture of each test, and perhaps after another module's run in another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        run(folder)
    return folder


def test_a_run_leaves_everything_it_promises(uninterrupted: Path) -> None:
    for name in ("metrics.jsonl", "summary.json", "config.json", "curves.png", "before_after.png"):
        assert (uninterrupted / name).stat().st_size > 0, name
    assert (uninterrupted / "allocation_maps.png").stat().st_size > 0
    assert (uninterrupted / "report.html").stat().st_size < 5_000_000
    data = shown_in_report(uninterrupted)
    assert len(data["cases"]) == 2 and all(len(case["pictures"]) == 3 for case in data["cases"])
    assert all(case["units"][0] == "all words" and len(case["units"]) > 1 for case in data["cases"])
    assert (uninterrupted / "adapter" / "pytorch_lora_weights.safetensors").stat().st_size > 0
    assert list(uninterrupted.rglob("events.out.tfevents.*"))
    records = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    iterations = [record for record in records if "reward/mean" in record]
    assert [record["iteration"] for record in iterations] == [1, 2, 3, 4]
    for key in ("train/clip_fraction", "train/kl", "train/gradient_norm", "seconds/rollout", "seconds/reward"):
        assert all(np.isfinite(record[key]) for record in iterations), key
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["iterations"] == 4 and summary["held_out_prompts"] == 4


def test_every_evaluation_leaves_its_adapter_and_scores_and_the_best_is_named(uninterrupted: Path) -> None:
    root = uninterrupted / "snapshots"
    kept = {path.name: json.loads((path / "scores.json").read_text()) for path in root.glob("iteration_*")}
    assert sorted(kept) == ["iteration_000002", "iteration_000004"]
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    logged = {line["iteration"]: line["eval/graded"] for line in lines if "eval/graded" in line}
    assert {entry["iteration"]: entry["scores"]["graded"] for entry in kept.values()} == {
        key: value for key, value in logged.items() if key
    }
    best = max((2, 4), key=lambda iteration: (logged[iteration], -iteration))
    assert json.loads((root / "best.json").read_text())["iteration"] == best
    weights = [load_file(root / name / "pytorch_lora_weights.safetensors") for name in sorted(kept)]
    final = load_file(uninterrupted / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(weights[1][name], value) for name, value in final.items())
    assert any(not torch.equal(weights[0][name], value) for name, value in final.items())


def test_any_checkpoint_and_snapshot_becomes_an_adapter(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run, ignore=shutil.ignore_patterns("iteration_000004", "adapter"))
    shutil.copytree(uninterrupted / "checkpoints" / "iteration_000004", run / "checkpoints" / "iteration_000004")

    def exported(*options: str) -> dict[str, torch.Tensor]:
        out = tmp_path / "_".join(("out", *options))
        assert export_main([str(run), *options, "--out", str(out)]) == 0
        return load_file(out / "pytorch_lora_weights.safetensors")

    # Of a checkpoint, as the run itself exports it; of a snapshot, whose checkpoint is gone; of the last but one.
    final = load_file(uninterrupted / "adapter" / "pytorch_lora_weights.safetensors")
    third = load_file(run / "checkpoints" / "iteration_000003" / "average.safetensors")
    snapshot = load_file(run / "snapshots" / "iteration_000002" / "pytorch_lora_weights.safetensors")
    for found, expected in ((exported(), final), (exported("--iteration", "2"), snapshot)):
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    as_saved = {f"transformer.{name.replace('.default', '')}": value for name, value in third.items()}
    found = exported("--iteration", "3")
    assert found.keys() == as_saved.keys() and all(torch.equal(found[name], as_saved[name]) for name in found)
    assert read_adapter(str(tmp_path / "out"), StableDiffusion3(), "x").metadata["lora_alpha"] == 32
    assert export_main([str(run), "--iteration", "1"]) == 2
    assert "(2, 3, 4), got 1" in capsys.readouterr().err


def test_the_device_is_chosen_before_rewards_load_and_again_in_the_thread_that_computes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noted(name: str, function):
        def call(*args, **kwargs):
            thread = "main" if threading.current_thread() is threading.main_thread() else "worker"
            events.append(f"{name}, {thread}")
            return function(*args, **kwargs)

        return call

    def reward_once(state, reward, worker, *args):
        worker.submit(noted("reward", lambda: None)).result()
        raise KeyboardInterrupt

    monkeypatch.setattr(devices, "own_device", lambda: torch.device("cuda", 3))
    for name in ("set_device", "set_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, noted(name, lambda device: None))
    monkeypatch.setattr(terms, "_find", noted("load", terms._find))
    monkeypatch.setattr(loop, "build_state", noted("accelerator", loop.build_state))
    monkeypatch.setattr(loop, "policy_gradient_iteration", reward_once)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    first = {event: events.index(event) for event in reversed(events)}
    assert first["set_device, main"] < first["load, main"] < first["accelerator, main"]
    assert [event for event in events if "worker" in event] == [
        *("set_device, worker", "Stream, worker", "set_stream, worker", "reward, worker")
    ]


def test_training_moves_the_weights(uninterrupted: Path) -> None:
    tensors = final_weights(uninterrupted)
    moved = [tensor for key, tensor in tensors.items() if key.startswith("policy/") and "lora_B" in key]
    assert moved and any(tensor.abs().max() > 0 for tensor in moved)


@pytest.mark.parametrize(
    "point",
    [
        "rollout",
        "signal",
        pytest.param("update", marks=pytest.mark.exhaustive),
        pytest.param("checkpoint", marks=pytest.mark.exhaustive),
    ],
)
def test_a_killed_run_ends_in_the_same_weights_bit_for_bit(point: str, uninterrupted: Path, tmp_path: Path) -> None:
    # What asks a run to end lets it save first.
    often = "checkpoints.every=100" if point == "signal" else "checkpoints.every=1"
    codes, printed = run_forked(kill_run.main, [point, str(tmp_path), *SMALL, often])
    assert codes == [128 + signal.SIGTERM if point == "signal" else -signal.SIGKILL], printed
    assert (point == "signal") == ("stopped by SIGTERM. 2 iterations are saved" in printed[0])
    assert not (tmp_path / "summary.json").exists()
    run(tmp_path)
    expected, resumed = final_weights(uninterrupted), final_weights(tmp_path)
    assert expected.keys() == resumed.keys()
    different = [key for key in expected if not torch.equal(expected[key], resumed[key])]
    assert not different

    def rewards(folder: Path) -> list[float]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["reward/mean"] for line in lines if "reward/mean" in line]

    assert rewards(tmp_path) == rewards(uninterrupted)


def test_a_run_that_an_earlier_version_left_goes_on_to_where_that_would_have_come(tmp_path: Path) -> None:
    kept = Path(__file__).parent / "run_of_before"
    shutil.copytree(kept, tmp_path / "run")
    # What it was started with; its LoRA targets were said, and are the family's today unless they are.
    settings = ["model.lora.rank=1", "model.lora.alpha=2", "model.lora.targets=[to_q]", "checkpoints.every=1"]
    settings += ["rollout.prompts=2", "rollout.samples=2", "rollout.steps=4", "rollout.sde_steps=2"]
    settings += ["evaluation.prompts=4", "evaluation.interim_prompts=2", "evaluation.pictures=1", "evaluation.steps=2"]
    options = [f"run.folder={tmp_path / 'run'}", "run.progress=false", "train.iterations=2"]
    settings += ["train.granularity=position"]  # the default of then
    # What changes by rounding at most may be another.
    options += ["train.batch_size=1", "rollout.batch_size=2", "rollout.keep_on_host=true", "rollout.encode_ahead=1"]
    options += ["model.gradient_checkpointing=true", "model.embedding_cache=1", "evaluation.every=1"]
    assert main(["tiny", *settings, *options]) == 0
    found, expected = final_weights(tmp_path / "run"), load_file(kept / "policy_after_2.safetensors")
    before = load_file(kept / "checkpoints" / "iteration_000001" / "policy.safetensors")
    for name, value in expected.items():
        # To the rounding of another processor.
        torch.testing.assert_close(found[f"policy/{name}"], value, rtol=0.0, atol=1e-5)
    assert max(float((expected[name] - before[name]).abs().max()) for name in before) > 1e-3
    records = [json.loads(line)["iteration"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records == [0, 1, 2, 2]
    kept_base, base = (load_file(run / "base_evaluation.safetensors") for run in (kept, tmp_path / "run"))
    assert kept_base.keys() == base.keys() and all(torch.equal(kept_base[name], base[name]) for name in base)


@pytest.mark.parametrize("method", ["uniform", "uniform_position", "shuffled", "inverted", "oracle"])
def test_methods_draw_the_same_random_numbers(method: str, uninterrupted: Path, tmp_path: Path) -> None:
    run(tmp_path, f"method={method}", "train.iterations=1")

    def first_reward(folder: Path) -> float:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return next(line["reward/mean"] for line in lines if "reward/mean" in line)

    # Before the first update the policy is the base model, whatever the method.
    assert first_reward(tmp_path) == pytest.approx(first_reward(uninterrupted), abs=1e-3)
    assert (tmp_path / "allocation_maps.png").exists() == (method in ("shuffled", "inverted"))
    star = load_file(uninterrupted / "base_evaluation.safetensors")["images"]
    assert torch.equal(load_file(tmp_path / "base_evaluation.safetensors")["images"], star)


def test_methods_train_on_the_same_samples_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[tuple[int, list[float]]]] = {}
    real = update_module.step_loss

    for method in ("star", "shuffled"):

        def watched(state, samples, step, method=method):
            # The noise that it starts from tells a sample.
            seen.setdefault(method, []).append((step, samples.latents[0, :, 0, 0, 0].tolist()))
            return real(state, samples, step)

        monkeypatch.setattr(update_module, "step_loss", watched)
        run(tmp_path / method, f"method={method}", "train.iterations=1", "train.step_fraction=0.5")
    assert seen["star"] == seen["shuffled"]


def iterations(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line]


LATER_STEP = ["rollout.sde_steps=null", "rollout.sde_window={size: 1, range: [1, 2]}"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("method, implementation", [("uniform", "auto"), ("star", "auto"), ("star", "sdpa")])
def test_training_passes_see_the_very_log_probs_of_the_rollout(
    method: str, implementation: str, guidance: float, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same_batches = ["rollout.batch_size=4", "train.batch_size=4", "train.iterations=1", "allocation.layers=[0, 2]"]
    later = LATER_STEP if guidance > 1.0 else []
    recipe = [f"model.dtype={dtype}", f"rollout.guidance_scale={guidance}", "model.gradient_checkpointing=true"]
    run(tmp_path, f"method={method}", f"allocation.implementation={implementation}", *same_batches, *recipe, *later)
    (record,) = iterations(tmp_path)
    assert record["train/log_ratio_mean"] == record["train/log_ratio_max"] == 0.0
    said = capsys.readouterr().out
    assert "log-ratio" not in said
    attention = {"auto": "fused", "sdpa": "sdpa:flash"}[implementation] if method == "star" else None
    assert ("attention of the recorded layers:" in said) == (attention is not None)
    assert attention is None or f"attention of the recorded layers: {attention}\n" in said


@pytest.mark.parametrize("kind", ["rollout", "recompute"])
def test_disagreement_with_the_rollout_is_measured_and_recomputing_removes_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deviations: list[float] = []
    real = update_module.step_loss

    def watched(state, samples, step):
        result, prediction = real(state, samples, step)
        deviations.append(max(float(result.metrics["ratio_max"]) - 1.0, 1.0 - float(result.metrics["ratio_min"])))
        return result, prediction

    monkeypatch.setattr(update_module, "step_loss", watched)
    # Training passes with another attention than the rollout's, as in a trainer that records with hooks.
    monkeypatch.setattr(update_module, "attention_of_the_rollout", lambda state: nullcontext())
    settings = ["rollout.guidance_scale=3.0", "train.iterations=1", "train.updates=1", "train.clip_range=1e-7"]
    settings += ["train.granularity=position"]  # an image's log-ratio is too small to be told from its ratio
    run(tmp_path, *settings, *LATER_STEP, f"train.old_log_prob={kind}")
    assert ("set train.old_log_prob=recompute" in capsys.readouterr().out) == (kind == "rollout")
    (record,) = iterations(tmp_path)
    assert 0.0 < record["train/log_ratio_mean"] < record["train/log_ratio_max"] < 1e-4
    if kind == "rollout":
        assert max(deviations) == pytest.approx(record["train/log_ratio_max"], rel=0.1)
    else:
        assert deviations == [0.0] * len(deviations)


def test_samples_kept_in_host_memory_train_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    run(tmp_path, "rollout.keep_on_host=true", "rollout.encode_ahead=1", "model.embedding_cache=1e-5")
    expected, got = final_weights(uninterrupted), final_weights(tmp_path)
    assert not [key for key in expected if not torch.equal(expected[key], got[key])]


def test_the_exported_adapter_gives_the_trained_model_in_diffusers(uninterrupted: Path) -> None:
    from diffusers import StableDiffusion3Pipeline
    from star_trainer.config.paths import TINY_PIPELINE

    pipeline = StableDiffusion3Pipeline.from_pretrained(TINY_PIPELINE, torch_dtype=torch.float32)
    model = pipeline.transformer
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, model.config.in_channels, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 32, model.config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, model.config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([500.0, 500.0]),
    }
    with torch.no_grad():
        base = model(**inputs).sample
        state = loop.build_state(load_config("tiny", [f"run.folder={uninterrupted}", *SMALL]))
        assert state.restore(uninterrupted / "checkpoints")
        with state.averaged_weights():
            trained = state.policy.model(**inputs).sample
        pipeline.load_lora_weights(str(uninterrupted / "adapter"))
        loaded = model(**inputs).sample
    assert (trained - base).abs().max() > 1e-4
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-5)


def test_a_finished_run_started_again_says_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    first = json.loads((tmp_path / "summary.json").read_text())
    records = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "report.html").unlink()
    second = run(tmp_path)
    assert shown_in_report(tmp_path) == shown_in_report(uninterrupted)
    for key in ("base", "final", "difference", "iterations"):
        assert first[key] == second[key]
    assert (tmp_path / "metrics.jsonl").read_text() == records
    assert second["seconds"] >= first["seconds"]


def test_starting_anew_sets_the_old_checkpoints_aside(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    run(tmp_path, "train.iterations=1", "run.resume=false")
    assert [path.name for path in (tmp_path / "checkpoints").glob("iteration_*")] == ["iteration_000001"]
    assert (tmp_path / "checkpoints.old1").is_dir()


def test_a_lost_base_evaluation_is_made_again_from_the_base_weights(tmp_path: Path) -> None:
    first = run(tmp_path, "train.iterations=1")
    (tmp_path / "base_evaluation.safetensors").write_bytes(b"damaged")
    second = run(tmp_path, "train.iterations=2")
    assert second["base"] == pytest.approx(first["base"])


@pytest.mark.parametrize(
    "setting",
    [
        "allocation.layers=[99]",
        "train.clip_range=0.5 train.granularity=position",
        "model.resolution=30",
        "model.resolution=72",
    ],
)
def test_what_only_the_model_can_tell_is_refused_before_the_run(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        run(tmp_path, *setting.split())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_reward_with_nan_ends_the_run_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tiny", f"run.folder={tmp_path}", *SMALL, "reward.terms={'reward_for_tests:not_a_number': 1.0}"]
    assert main(arguments) == 2
    assert "reward_for_tests:not_a_number" in capsys.readouterr().err


class Tracker(GeneralTracker):
    """What anybody may register with accelerate."""

    name, requires_logging_directory = "ours", False
    seen: list[Tracker] = []

    def __init__(self, project: str, **options: str) -> None:
        super().__init__()
        self.project, self.options, self.logged = project, options, {}
        Tracker.seen.append(self)

    @property
    def tracker(self) -> Tracker:
        return self

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int, **_: object) -> None:
        self.logged.setdefault(step, {}).update(values)


def test_every_term_is_logged_and_evaluated_by_itself_and_trackers_are_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "ours", Tracker)
    terms = "reward.terms={'reward_for_tests:brightness': 2.0, scene_graded: 1.0}"
    tracked = ["run.trackers={ours: {team: x}}", "run.project=week"]
    run(tmp_path, terms, *tracked, "train.iterations=1", "method=uniform")
    (tracker,) = Tracker.seen
    assert (tracker.project, tracker.options) == ("week", {"team": "x"}) and tracker.settings["method"] == "uniform"
    assert not list(tmp_path.rglob("events.out.tfevents.*"))
    base, line, final = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["reward/mean"] == pytest.approx(
        2.0 * line["train/reward_reward_for_tests:brightness"] + line["train/reward_scene_graded"]
    )
    for entry in (base, final):
        assert entry["eval/reward"] == pytest.approx(
            2.0 * entry["eval/reward_for_tests:brightness"] + entry["eval/scene_graded"]
        )
        assert entry["eval/scene_graded"] == entry["eval/graded"]
    assert tracker.logged[1]["reward/mean"] == line["reward/mean"]
    assert tracker.logged[1]["eval/scene_graded"] == final["eval/scene_graded"]


def test_trackers_that_cannot_be_had_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [])
    for name, said in (("wandb", "the package of wandb is not installed"), ("waandb", "expected some of .*wandb")):
        with pytest.raises(ConfigError, match=rf"run\.trackers: {said}"):
            train(load_config("tiny", [f"run.trackers=[{name}]"]))
    assert load_config("tiny", ["run.trackers=[]"]).run.trackers == {}
    assert load_config("tiny", ["run.trackers=wandb"]).run.trackers == {"wandb": {}}


def test_tensorboard_gets_the_scalars_samples_and_maps(uninterrupted: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags: dict[str, set[str]] = {"scalars": set(), "images": set()}
    for events in uninterrupted.rglob("events.out.tfevents.*"):
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        for kind in tags:
            tags[kind] |= set(accumulator.Tags()[kind])
    assert {"reward/mean", "reward/groups_without_spread", "train/clip_fraction"} <= tags["scalars"]
    assert "allocation_maps" in tags["images"] and any(tag.startswith("samples") for tag in tags["images"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_training_with_guidance_runs_and_exports_the_transformer(dtype: str, tmp_path: Path) -> None:
    overrides = ["model.lora=null", "rollout.guidance_scale=2.0", "train.iterations=1", "train.learning_rate=1e-5"]
    run(tmp_path, *overrides, f"model.dtype={dtype}")
    assert export_main([str(tmp_path), "--out", str(tmp_path / "again")]) == 0
    weights, again = (
        load_file(tmp_path / folder / "diffusion_pytorch_model.safetensors") for folder in ("transformer", "again")
    )
    assert "pos_embed.pos_embed" in weights and weights.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_a_checkpoint_of_other_settings_is_refused_by_the_key(uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"train\.learning_rate"):
        run(uninterrupted, "train.learning_rate=1e-5")


def test_nan_in_the_update_is_skipped_logged_and_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys.modules["star_trainer.families.policy"].Policy,
        "velocity",
        _poison(sys.modules["star_trainer.families.policy"].Policy.velocity),
    )
    with pytest.raises(NonFiniteError, match="in a row"):
        run(tmp_path, "train.max_skipped_updates=3")
    out = capsys.readouterr().out
    assert "update skipped (1 in a row)" in out and "step " in out and "samples" in out


def _poison(velocity):
    """NaN in one latent of whatever is predicted with gradients: in the update, not in the rollout."""

    def poisoned(self, latents, timestep, embeddings):
        result = velocity(self, latents, timestep, embeddings)
        if torch.is_grad_enabled():
            result = result.clone()
            result[0, 0, 0, 0] = float("nan")
        return result

    return poisoned


@pytest.mark.parametrize(
    ("where", "failure"),
    [("collect", NonFiniteError("NaN in samples")), ("step_loss", torch.OutOfMemoryError("CUDA out of memory"))],
)
def test_what_was_trained_is_saved_when_the_next_iteration_fails(
    where: str, failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = getattr(update_module, where), []

    def fails_in_the_second(*arguments):
        calls.append(where)
        if len(calls) > {"collect": 1, "step_loss": 4}[where]:
            raise failure
        return real(*arguments)

    monkeypatch.setattr(update_module, where, fails_in_the_second)
    options = ["checkpoints.every=100", "evaluation.every=100", "method=uniform"]
    assert main(["tiny", f"run.folder={tmp_path}", *SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert "1 iterations are saved" in error and str(failure) in error
    assert [path.name for path in (tmp_path / "checkpoints").glob("iteration_*")] == ["iteration_000001"]


def test_one_bad_update_leaves_weights_and_optimiser_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    real_build, real_loss = loop.build_state, update_module.step_loss

    def build(config):
        states.append(real_build(config))
        return states[-1]

    def bad_loss(*args):
        result, prediction = real_loss(*args)
        return result._replace(loss=result.loss * float("inf")), prediction

    monkeypatch.setattr(loop, "build_state", build)
    monkeypatch.setattr(update_module, "step_loss", bad_loss)
    run(tmp_path, "train.iterations=1", "train.updates=1")
    (state,) = states
    assert state.skipped_in_a_row == 1
    assert all(p.abs().max() == 0 for name, p in state.policy.trainable().items() if "lora_B" in name)
    assert not state.optimizer.state


def test_the_command_reports_a_run_that_cannot_go_on_with_status_2(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decisive = {"rollout.eta": 0.5, "train.weight_decay": 0.1, "train.clip_range": 2e-4, "model.lora.rank": 3}
    changed = [f"{key}={value}" for key, value in decisive.items()]
    free = ["evaluation.steps=3", "checkpoints.every=7", "train.max_skipped_updates=9"]
    assert main(["tiny", f"run.folder={uninterrupted}", *SMALL, "method=uniform", *changed, *free]) == 2
    error = capsys.readouterr().err
    assert "method was 'star', is 'uniform'" in error and all(f"{key} was" in error for key in decisive)
    assert not any(entry.partition("=")[0] in error for entry in free)


def test_files_of_prompts_that_were_edited_between_two_starts_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"

    def write(path: Path, *prompts: str) -> None:
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

    def start(iterations: int, folder: str = "run") -> dict[str, dict[str, float]]:
        files = [f"prompts.source={source}", f"prompts.held_out={held_out}", "evaluation.prompts=8"]
        options = [f"run.folder={tmp_path / folder}", f"train.iterations={iterations}", "method=uniform"]
        assert main(["tiny", *SMALL, *files, *options]) == 0
        return json.loads((tmp_path / folder / "summary.json").read_text())

    write(source, "a red circle", "a blue square", "a green cross")
    write(held_out, "a red cross", "a blue circle", "a cyan square")
    first = start(1)
    write(held_out, "a yellow triangle", "a purple cross", "a red square")
    second = start(1)
    # Measured anew, with the prompts of now, as a run that has never seen others does.
    assert second["base"] == pytest.approx(start(1, "alone")["base"], rel=1e-6) != first["base"]
    write(held_out, "a yellow triangle", "a purple cross", "a red square", "a green circle")
    assert start(2)["held_out_prompts"] == 4
    write(source, "a red circle", "a blue square", "a green triangle")
    capsys.readouterr()
    assert main(["tiny", *SMALL, f"prompts.source={source}", f"prompts.held_out={held_out}", "method=uniform",
                 f"run.folder={tmp_path / 'run'}"]) == 2  # fmt: skip
    assert "prompts.source was" in capsys.readouterr().err
    source.rename(tmp_path / "moved.jsonl")
    source = tmp_path / "moved.jsonl"
    write(source, "a red circle", "a blue square", "a green cross")
    assert start(3)["iterations"] == 3


def test_paired_differences() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(200)
    better = paired_difference(before, before + 0.1 + 0.05 * rng.standard_normal(200))
    assert better.low < 0.1 < better.high and better.low > 0
    same = paired_difference(before, before)
    assert (same.mean, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="after"):
        paired_difference(before, before[:5])


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(tmp_path / ".lock"):
        assert main(["tiny", f"run.folder={tmp_path}", *SMALL]) == 2
    assert f"run.folder: another process is training in {tmp_path}" in capsys.readouterr().err
    assert not {path.name for path in tmp_path.iterdir()} - {".lock"}
