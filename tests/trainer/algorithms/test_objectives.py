"""The settings of the objective: where ratios are taken, how much a step counts, and what holds the policy back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from star_trainer.algorithms.policy_gradient import (
    Samples,
    batch_of,
    divergence,
    log_prob,
    plan_steps,
    predict,
    step_loss,
    take,
)
from star_trainer.algorithms.rollout import Rollout, collect
from star_trainer.config import load_config
from star_trainer.run.state import TrainingState, build_state
from star_trainer.sampling import with_last
from star_trainer.train import train
from star_trainer.worlds.scenes.captions import sample_prompts

import star_kernels as sk

SMALL = ["rollout.prompts=2", "rollout.samples=3", "rollout.steps=4", "rollout.sde_steps=3", "rollout.batch_size=6"]
STEPS = [0, 1, 2]
# What a large model is trained with.
RECIPE = ["model.dtype=bfloat16", "rollout.guidance_scale=4.5", "model.gradient_checkpointing=true"]
DPPO = ["train.objective=dppo", "train.divergence_limit=1e-5"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingState, Rollout]:
    AcceleratorState._reset_state(reset_partial_state=True)
    state = build_state(load_config("tiny", [*SMALL, *DPPO, f"run.folder={tmp_path_factory.mktemp('run')}"]))
    prompts = sample_prompts(np.random.default_rng(0), 2, held_out=False)
    with ThreadPoolExecutor(1) as worker:
        return state, collect(state.policy, state.config, prompts, lambda images, _: np.zeros(len(images)), worker, 0)


def with_settings(state: TrainingState, *overrides: str) -> TrainingState:
    return replace(state, config=load_config("tiny", [*SMALL, *overrides]))


@contextmanager
def moved_by(state: TrainingState, size: float) -> Iterator[None]:
    """Within this context the adapters are so far from where they were."""
    changed = [value for name, value in state.policy.trainable().items() if "lora_B" in name]
    generator = torch.Generator().manual_seed(1)
    before = [value.detach().clone() for value in changed]
    with torch.no_grad():
        for value in changed:
            value += size * torch.randn(value.shape, generator=generator)
    yield
    with torch.no_grad():
        for value, old in zip(changed, before, strict=True):
            value.copy_(old)


def samples_of(state: TrainingState, rollout: Rollout) -> Samples:
    return take(state, batch_of(state, rollout, np.array([1.0, -1.5, 0.5, 0.3, -0.7, 0.4]), STEPS), np.arange(6))


def loss_of(state: TrainingState, rollout: Rollout, step: int, *, moved: float) -> tuple[sk.PolicyLoss, torch.Tensor]:
    """The loss of all samples at a step and its gradient, with adapters `moved` from where the rollout was drawn."""
    with moved_by(state, moved):
        result, _ = step_loss(state, samples_of(state, rollout), step)
        gradients = torch.autograd.grad(result.loss, list(state.policy.trainable().values()))
    return result, torch.cat([gradient.flatten() for gradient in gradients])


def test_on_policy_the_gradient_of_positions_is_that_of_the_weighted_image(
    sampled: tuple[TrainingState, Rollout],
) -> None:
    state, rollout = sampled
    position, image = (with_settings(state, f"train.granularity={name}") for name in ("position", "image"))
    expected, found = (loss_of(each, rollout, 1, moved=0.0)[1] for each in (position, image))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    apart = [loss_of(each, rollout, 1, moved=3e-3)[1] for each in (position, image)]
    assert not torch.allclose(*apart, rtol=1e-2)


@pytest.mark.parametrize("objective", ["clip", "none", "guard"])
def test_even_maps_are_the_uniform_method_bit_for_bit(objective: str, sampled: tuple[TrainingState, Rollout]) -> None:
    state, rollout = sampled
    even = replace(rollout, trajectory=replace(rollout.trajectory, weights=torch.ones_like(rollout.trajectory.weights)))
    none = replace(rollout, trajectory=replace(rollout.trajectory, weights=None))
    star = with_settings(state, "train.granularity=image", f"train.objective={objective}")
    # Its attention is not the recorder's: of the method, what matters here is where ratios are taken.
    found, expected = (loss_of(star, each, 1, moved=1e-3) for each in (even, none))
    assert torch.equal(found[0].loss, expected[0].loss) and torch.equal(found[1], expected[1])


def test_temporal_weights_multiply_the_policy_term_and_not_the_kl(sampled: tuple[TrainingState, Rollout]) -> None:
    state, rollout = sampled
    settings = ["train.kl_weight=0.5", "train.kl_scale=velocity"]
    plain = with_settings(state, *settings)
    weighted = with_settings(state, *settings, "allocation.temporal=velocity")
    expected = sk.temporal_weights([rollout.trajectory.coefficients[step] for step in STEPS], kind="velocity").tolist()
    assert max(expected) > 1.5 and np.mean(expected) == pytest.approx(1.0, abs=1e-6)
    for step in STEPS:
        one, other = (loss_of(each, rollout, step, moved=3e-3)[0].metrics for each in (plain, weighted))
        assert float(other["policy_loss"]) == pytest.approx(expected[step] * float(one["policy_loss"]), abs=1e-6)
        assert torch.equal(one["kl"], other["kl"]) and float(one["kl"]) > 0


def test_clip_ranges_spread_like_the_log_ratios_and_keep_their_mean(sampled: tuple[TrainingState, Rollout]) -> None:
    state, rollout = sampled
    rows = rollout.trajectory.coefficients
    spread = np.array([abs(float(rows[step].velocity_scale)) / float(rows[step].std) for step in STEPS])

    def ranges(*overrides: str) -> np.ndarray:
        plans = plan_steps(with_settings(state, "train.clip_range=1e-3", *overrides), rows, STEPS)
        return np.array([plans[step].clip_range for step in STEPS])

    np.testing.assert_allclose(ranges("train.granularity=image"), 1e-3)
    np.testing.assert_allclose(ranges("train.granularity=position"), 16e-3)
    by_step = ranges("train.granularity=image", "train.clip_range_by_step=spread")
    np.testing.assert_allclose(by_step, 1e-3 * spread / spread.mean(), rtol=1e-5)
    assert by_step[-1] > 1.5 * by_step[0]


def test_log_ratios_tell_the_divergence_that_old_velocities_give(sampled: tuple[TrainingState, Rollout]) -> None:
    state, rollout = sampled
    samples = samples_of(state, rollout)
    for step in STEPS:
        exact = loss_of(state, rollout, step, moved=1e-2)[0].metrics["divergence"]
        with moved_by(state, 1e-2), torch.no_grad():
            prediction = predict(state, samples, step)
        difference = log_prob(state, samples, step, prediction) - samples.old_log_prob[step]
        found = divergence(difference, prediction.velocity.shape[1])
        assert 1e-6 < float(exact) < 0.01
        assert float(found) == pytest.approx(float(exact), rel=0.1)


def test_dppo_keeps_what_is_near_and_drops_what_goes_further(sampled: tuple[TrainingState, Rollout]) -> None:
    state, rollout = sampled
    limits = {limit: with_settings(state, *DPPO[:1], f"train.divergence_limit={limit}") for limit in (1.0, 0.0)}
    near, far = (loss_of(each, rollout, 1, moved=3e-3)[0].metrics["clip_fraction"] for each in limits.values())
    assert float(near) == 0.0 < float(far) < 1.0


def test_geometric_maps_have_mean_1_and_are_those_of_the_last_step_and_their_own() -> None:
    maps = torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    maps /= maps.mean((-2, -1), keepdim=True)
    found = with_last(maps)
    torch.testing.assert_close(found.mean((-2, -1)), torch.ones(4, 2))
    torch.testing.assert_close(found[-1], maps[-1])
    shape = (maps[0] * maps[-1]).sqrt()
    torch.testing.assert_close(found[0] / shape, (1 / shape.mean((-2, -1), keepdim=True)).expand_as(shape))
    assert torch.equal(with_last(torch.ones(3, 2, 8, 8)), torch.ones(3, 2, 8, 8))
    apart = 2 * torch.stack([torch.eye(2), 1 - torch.eye(2)])[:, None]
    assert torch.equal(with_last(apart), apart), "no place in common"


def run(folder: Path, *overrides: str) -> None:
    small = ["rollout.batch_size=3", "train.batch_size=3", "train.iterations=2", "train.learning_rate=1e-3"]
    small += ["run.progress=false", "reward.terms={'reward_for_tests:brightness': 1.0}", "checkpoints.every=1"]
    small += ["evaluation.prompts=2", "evaluation.interim_prompts=2", "evaluation.steps=1", "evaluation.pictures=1"]
    AcceleratorState._reset_state(reset_partial_state=True)
    train(load_config("tiny", [f"run.folder={folder}", *SMALL, *small, *overrides]))


def iterations(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("iteration_*"))
    return load_file(newest / "policy.safetensors")


COMBINATIONS = {
    "weighted image": ["train.granularity=image", "allocation.temporal=velocity", "train.clip_range_by_step=spread"],
    "guard": ["train.objective=guard", "allocation.temporal=std", "rollout.keep_on_host=true"],
    "dppo": [*DPPO, "train.granularity=image", "allocation.map=geometric", "train.old_log_prob=recompute"],
    "none": ["train.objective=none", "train.kl_weight=0.01", "train.kl_scale=velocity", "method=inverted"],
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_run_with_a_real_recipe_logs_by_step_and_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    settings = [*RECIPE, *COMBINATIONS[name]]
    run(tmp_path / "whole", *settings)
    run(tmp_path / "stopped", *settings, "train.iterations=1")
    run(tmp_path / "stopped", *settings)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert any(value.abs().max() > 0 for key, value in whole.items() if "lora_B" in key)
    for record in iterations(tmp_path / "whole"):
        for what in ("clip_fraction", "divergence"):
            by_step = [record[f"train/{what}/step_{step + 1}"] for step in STEPS]
            assert record[f"train/{what}"] == pytest.approx(np.mean(by_step), rel=1e-6, abs=1e-12)
        assert 0 < record["train/divergence"] < 1
        taus = [record.get(f"train/temporal_weight/step_{step + 1}", 1.0) for step in STEPS]
        assert np.mean(taus) == pytest.approx(1.0, abs=1e-6)
        assert (max(taus) > 1.1) == any("temporal" in setting for setting in settings)


@pytest.mark.parametrize("objective", [["train.objective=guard"], DPPO, []])
def test_before_an_update_nothing_has_moved(objective: Sequence[str], tmp_path: Path) -> None:
    run(tmp_path, *RECIPE, *objective, "train.updates=1", "train.iterations=1", "allocation.temporal=velocity")
    (record,) = iterations(tmp_path)
    assert record["train/divergence"] < 1e-9 and record["train/clip_fraction"] == 0.0
