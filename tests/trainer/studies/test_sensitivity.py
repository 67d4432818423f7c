"""star-sensitivity: estimators against constructions whose answer is known, and the command on the small pipeline."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from star_trainer.algorithms.advantages import group_advantages
from star_trainer.algorithms.policy_gradient import batch_of, step_loss, take
from star_trainer.algorithms.rollout import collect
from star_trainer.config import load_config
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardError
from star_trainer.rewards.scenes import scene_graded
from star_trainer.run.inputs import load_prompts
from star_trainer.run.state import build_state
from star_trainer.studies.sensitivity import progress
from star_trainer.studies.sensitivity.cli import main, tables
from star_trainer.studies.sensitivity.gradients import (
    batch_gradients,
    jackknife,
    moments,
    other_weights,
    pair_means,
    relate_steps,
    summarise,
    sums_of,
)
from star_trainer.studies.sensitivity.maps import (
    Cases,
    auroc,
    edit,
    edits,
    farthest,
    moved,
    overlap,
    regional_correlation,
    top_region,
)
from star_trainer.worlds.scenes.captions import COLOURS, sample_prompts
from star_trainer.worlds.scenes.renderer import SceneObject, shape_mask

SMALL = [
    "rollout.prompts=2",
    "rollout.samples=2",
    "rollout.batch_size=4",
    "rollout.steps=2",
    "rollout.sde_steps=1",
    "train.batch_size=3",
]


def test_signal_and_noise_of_gaussian_gradients_are_unbiased() -> None:
    rng = np.random.default_rng(0)
    mean = rng.normal(size=40) * 0.3
    estimates = []
    for _ in range(400):
        batches = mean + rng.normal(size=(12, 40)) * 2.0
        found = moments(batches @ batches.T)
        estimates.append((found.signal[0], found.noise[0]))
    signal, noise = np.array(estimates).T
    assert signal.mean() == pytest.approx((mean**2).sum(), abs=4 * signal.std() / 20)
    assert noise.mean() == pytest.approx(40 * 4.0, abs=4 * noise.std() / 20)


def test_what_is_left_out_is_left_out() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 6, 9))
    products = first @ second.T
    between, within = pair_means(products)
    for place, kept in enumerate([list(range(6)), *([j for j in range(6) if j != i] for i in range(6))]):
        part = products[np.ix_(kept, kept)]
        assert within[place] == pytest.approx(np.diagonal(part).mean())
        assert between[place] == pytest.approx(part[~np.eye(len(kept), dtype=bool)].mean())
    unit = first / np.linalg.norm(first, axis=1, keepdims=True)
    assert moments(first @ first.T).cosine == pytest.approx(pair_means(unit @ unit.T)[0])


def test_jackknife_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    mean = np.full(30, 0.4)
    truth = (mean**2).sum() / 30.0
    covered = 0
    for _ in range(150):
        batches = mean + rng.normal(size=(25, 30))
        (found,) = summarise("all", {"star": torch.from_numpy(batches)})
        covered += found.ratio.low <= truth <= found.ratio.high
        assert found.batches == 25
    assert 0.87 <= covered / 150 <= 1.0


def test_identical_gradients_have_no_noise_and_cosine_one() -> None:
    found = moments(np.full((4, 4), 2.0))
    assert (found.signal[0], found.noise[0], found.cosine[0]) == pytest.approx((2.0, 0.0, 1.0))
    assert jackknife(found.cosine).low == pytest.approx(1.0)


def test_arms_are_compared_batch_by_batch() -> None:
    """Noise that two arms share is in neither's difference: that interval is far narrower than their own."""
    rng = np.random.default_rng(2)
    uniform = torch.from_numpy(0.5 + rng.normal(size=(40, 20)))
    star = uniform * 0.99 + 0.02
    found, other = summarise("all", {"star": star, "uniform": uniform})
    assert found.ratio_less_uniform is not None and other.ratio_less_star is not None
    width = found.ratio_less_uniform.high - found.ratio_less_uniform.low
    assert width < (found.ratio.high - found.ratio.low) / 5
    assert found.ratio_less_uniform.value == pytest.approx(found.ratio.value - other.ratio.value)
    assert other.ratio_less_star.value == pytest.approx(-found.ratio_less_uniform.value)
    assert found.ratio_less_star is None and other.ratio_less_uniform is None and other.cosine_to_uniform is None


def test_what_does_not_point_along_the_gradient_of_the_reward_is_told_apart() -> None:
    """Little noise about another direction is a high ratio, and nothing along uniform's."""
    rng = np.random.default_rng(4)
    along, across = torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    along[0], across[1] = 2.0, 2.0
    uniform, beside, half = (
        mean + torch.from_numpy(rng.normal(size=(200, 50))) * spread
        for mean, spread in ((along, 1.0), (across, 0.1), (along + across, 0.5))
    )
    found = {signal.arm: signal for signal in summarise("all", {"uniform": uniform, "beside": beside, "half": half})}
    assert found["beside"].ratio.value == pytest.approx(4 / 0.5, rel=0.05)
    assert found["beside"].cosine_to_uniform.low < 0.0 < found["beside"].cosine_to_uniform.high
    assert found["beside"].ratio_along_uniform.value < 0.1
    assert found["half"].cosine_to_uniform.value == pytest.approx(0.5**0.5, abs=0.05)
    assert found["half"].ratio_along_uniform.value == pytest.approx(4 / 12.5, rel=0.15)


def test_a_direction_that_is_not_known_has_no_cosine() -> None:
    """Of even weights without a signal that n batches see, nothing can lie along it."""
    noise = torch.from_numpy(np.random.default_rng(5).normal(size=(20, 30)))
    noise -= noise.mean(0)
    found, _ = summarise("all", {"star": noise + 1.0, "uniform": noise})
    assert found.cosine_to_uniform is None and found.ratio_along_uniform is None
    assert found.ratio_less_uniform is not None


def test_two_batches_are_too_few() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        summarise("all", {"star": torch.ones(2, 2)})


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory):
    AcceleratorState._reset_state(reset_partial_state=True)
    return build_state(load_config("tiny", [*SMALL, f"run.folder={tmp_path_factory.mktemp('run')}"]))


def test_gradients_are_those_of_an_on_policy_update(state) -> None:
    """With all samples in one part, the gradient of each arm is what the trainer's own loss gives."""
    prompts = sample_prompts(np.random.default_rng(0), 2, held_out=False)

    def reward(images, batch):
        return images.astype(np.float64).mean(axis=(1, 2, 3))

    with ThreadPoolExecutor(1) as worker:
        rollout = collect(state.policy, state.config, prompts, reward, worker, 0)
    advantages = group_advantages(rollout.rewards, 2)
    star = rollout.trajectory.weights
    maps = {"star": star, "uniform": None, "half": 0.5 + 0.5 * star}
    found = batch_gradients(state, rollout, advantages.values, maps)
    parameters = list(state.policy.trainable().values())
    for arm, weights in maps.items():
        weighted = replace(rollout, trajectory=replace(rollout.trajectory, weights=weights))
        batch = batch_of(state, weighted, advantages.values, [0])
        result, _ = step_loss(state, take(state, batch, np.arange(4)), 0)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(result.loss, parameters)])
        torch.testing.assert_close(found[arm, 0], expected, atol=1e-6 * float(expected.abs().max()) + 1e-9, rtol=1e-3)
    assert not torch.allclose(found["star", 0], found["uniform", 0])
    between = (found["star", 0] + found["uniform", 0]) / 2
    torch.testing.assert_close(found["half", 0], between, atol=1e-6 * float(between.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("guidance", ["1.0", "2.0"])
def test_maps_with_other_settings_are_those_that_a_rollout_with_them_has(guidance: str, tmp_path: Path) -> None:
    """Samples do not depend on the settings of the maps, so that rollouts with each of them are the same."""
    rows = {
        "own": [],
        "settings": ["allocation.combine=max", "allocation.strength=[0.25, 0.5]", "allocation.smooth=true"],
        "one": ["allocation.layers=[3]"],
        "two": ["allocation.layers=[1,2]", "allocation.sharpness=1"],
    }
    prompts = sample_prompts(np.random.default_rng(0), 2, held_out=False)
    common = [*SMALL, "rollout.steps=3", "rollout.sde_steps=2", "rollout.batch_size=3", f"run.folder={tmp_path}"]
    found, rolled = {}, {}
    for name, overrides in rows.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        config = load_config("tiny", [*common, f"rollout.guidance_scale={guidance}", *overrides])
        state = build_state(config)
        with ThreadPoolExecutor(1) as worker:
            rollout = collect(state.policy, config, prompts, lambda images, batch: np.zeros(len(batch)), worker, 0)
        rolled[name] = rollout.trajectory.weights
        if name == "own":
            allocations = {key: load_config("tiny", [*common, *given]).allocation for key, given in rows.items()}
            found = other_weights(state, rollout, allocations)
    for name, weights in found.items():
        assert weights.shape == (2, 4, 8, 8), "up to the last step with noise"
        torch.testing.assert_close(weights, rolled[name][:2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["own"], found["one"], atol=1e-2)
    assert not torch.allclose(found["own"], found["settings"], atol=1e-2)


def test_aligned_steps_are_seen_to_be_and_the_best_weights_have_the_most_signal() -> None:
    """Three steps with one mean direction, whose noises differ: what the weights make of them is known."""
    rng = np.random.default_rng(7)
    mean = rng.normal(size=60) / math.sqrt(60)
    lengths, spreads = {0: 1.0, 1: 2.0, 2: 1.0}, {0: 0.2, 1: 1.0, 2: 2.0}
    gradients = {
        step: torch.from_numpy(lengths[step] * mean + spreads[step] * rng.normal(size=(400, 60)) / math.sqrt(60))
        for step in lengths
    }
    found = relate_steps("star", gradients, {"none": [1.0] * 3, "velocity": [1.5, 1.0, 0.5]})
    assert found.steps == [0, 1, 2] and np.mean(found.weights["best"]) == pytest.approx(1.0)
    expected = np.array([lengths[step] / spreads[step] ** 2 for step in lengths])
    np.testing.assert_allclose(found.weights["best"], expected / expected.mean(), rtol=0.1, atol=0.02)
    for one in range(3):
        for other in range(3):
            estimate = found.cosines[one][other]
            assert estimate is not None and estimate.low < 1.0 + 1e-9 and estimate.value == pytest.approx(1.0, abs=0.1)
    sums = sums_of({"star": gradients}, [found])
    assert set(sums) == {"all", "all, velocity", "all, best"}
    torch.testing.assert_close(sums["all"]["star"], sum(gradients.values()))
    weighted = 1.5 * gradients[0] + gradients[1] + 0.5 * gradients[2]
    torch.testing.assert_close(sums["all, velocity"]["star"], weighted)
    ratios = {kind: summarise(kind, own)[0].ratio.value for kind, own in sums.items()}
    assert ratios["all, best"] > ratios["all, velocity"] > ratios["all"]
    best = sum(lengths[step] ** 2 / spreads[step] ** 2 for step in lengths) * float(mean @ mean)
    assert ratios["all, best"] == pytest.approx(best, rel=0.1)


def picture(*objects: SceneObject) -> np.ndarray:
    canvas = np.full((64, 64, 3), 120.0)
    for item in objects:
        coverage = shape_mask(item.shape, item.x, item.y, item.radius)[..., None]
        canvas = canvas * (1 - coverage) + np.array(COLOURS[item.colour]) * coverage
    return canvas.round().astype(np.uint8)


@pytest.fixture
def cases() -> Cases:
    """Squares in four places; `map` is right, `wrong prompt` that of another image, `text-blind` even."""
    places = [(24.0, 24.0), (40.0, 24.0), (24.0, 40.0), (40.0, 40.0)]
    images = np.stack([picture(SceneObject("square", "red", x, y, 8.0)) for x, y in places])
    right = np.full((1, 4, 8, 8), 0.1)
    for case, (x, y) in enumerate(places):
        right[0, case, int(y) // 8 - 1 : int(y) // 8 + 1, int(x) // 8 - 1 : int(x) // 8 + 1] = 14.5
    prompt = Prompt("a red square", {"include": [{"class": "square", "count": 1, "color": "red"}]})
    maps = {"map": right, "wrong prompt": np.roll(right, 1, axis=1), "text-blind": np.ones_like(right)}
    return Cases([prompt] * 4, images, torch.zeros(4, 4, 16, 16), maps)


def test_overlap_is_perfect_for_the_true_map_and_chance_for_an_even_one(cases: Cases) -> None:
    found = {(score.what, score.map): score for score in overlap(cases)}
    assert found["object AUROC", "map"].value == 1.0 and found["weight on objects", "map"].value == 14.5
    assert found["object AUROC", "text-blind"].value == 0.5 and found["weight on objects", "text-blind"].value == 1.0
    assert found["object AUROC", "wrong prompt"].value < 0.5 and found["object AUROC", "map"].n == 4


def test_painting_over_the_top_of_the_true_map_costs_the_reward(cases: Cases) -> None:
    scores = edits(cases, scene_graded, 4 / 64, np.random.default_rng(0))
    found = {(score.what, score.map): score.value for score in scores}
    assert found["reward lost inside", "map"] == 1.0 and found["reward lost outside", "map"] == 0.0
    assert found["reward lost inside", "wrong prompt"] == 0.0
    correlation = {score.map: score for score in regional_correlation(cases, scene_graded)}
    assert correlation["map"].value > 0.9 > correlation["wrong prompt"].value
    assert correlation["text-blind"].n == 0, "an even map has no correlation"


def test_an_even_map_points_nowhere(cases: Cases) -> None:
    maps = {name: np.concatenate([np.ones((1, 4, 8, 8)), steps]) for name, steps in cases.maps.items()}
    scores = edits(replace(cases, maps=maps), scene_graded, 4 / 64, np.random.default_rng(0))
    found = {(score.what, score.map, score.step): score for score in scores}
    assert found["reward lost inside", "map", 0].n == 0 and np.isnan(found["reward lost inside", "map", 0].value)
    assert found["reward lost inside", "map", 1].value == 1.0 and found["reward lost inside", "text-blind", 1].n == 0
    row = next(line for line in tables(scores, []).splitlines() if line.startswith("| map |"))
    assert row == "| map |  | 1.000 ± 0.000 | 4 |"


def test_regions(cases: Cases) -> None:
    weights = np.arange(12.0).reshape(3, 4)
    region = top_region(weights, 0.25)
    assert region.sum() == 3 and region[2, 1:].all()
    assert (farthest(region) & region).sum() == 0 and farthest(region).sum() == 3
    assert np.array_equal(moved(region, 4), np.roll(region, 1, axis=0))
    assert top_region(weights, 1e-6).sum() == 1
    edited = edit(cases.images, np.ones((4, 8, 8), dtype=bool))
    assert np.array_equal(edited, cases.images), "nothing is left to take a colour from"


def test_auroc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    values, positive = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in values[positive] for b in values[~positive]]
    assert auroc(values, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(values, np.zeros(40, dtype=bool)))


def test_the_command_measures_everything_on_the_small_pipeline(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["tiny", *SMALL, f"run.folder={tmp_path / 'run'}", "--prompts", "6", "--batches", "3"]
    arguments += ["--progress", "2", "--progress-lengths", "1,2.5"]
    folder = tmp_path / "to be" / "made"
    assert main([*arguments, "--folder", str(folder)]) == 0
    content = json.loads((folder / "sensitivity.json").read_text())
    assert {score["map"] for score in content["scores"]} == {
        *("map", "wrong prompt", "text-blind"),
        *(f"layer {layer}" for layer in range(4)),
    }
    # Where no step's signal is seen, nothing is best.
    assert {(signal["arm"], signal["step"]) for signal in content["gradients"] if "best" not in signal["step"]} == {
        (arm, step)
        for arm in ("star", "uniform", "shuffled", "inverted", "oracle")
        for step in ("0", "all", "all, std", "all, velocity")
    }
    longer = {(step["arm"], step["kind"]): step["length"] for step in content["progress"][10:]}
    assert longer.keys() == {
        (arm, kind) for arm in ("star", "uniform", "shuffled", "inverted", "oracle") for kind in ("none", "velocity")
    }
    for step in content["progress"][:10]:
        assert longer[step["arm"], step["kind"]] == pytest.approx(2.5 * step["length"]) and step["n"] == 2
    for name in ("sensitivity.png", "cases.png"):
        assert (folder / name).stat().st_size > 10_000
    shown = (folder / "report.html").read_text(encoding="utf-8")
    assert shown.count('class="case"') == 6 and '<th scope="row">star</th>' in shown
    assert "| star | all |" in (folder / "sensitivity.md").read_text()


def test_a_step_goes_against_its_gradient_as_far_as_all_others_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rewards that are minus a linear function of the weights, the gain is the length times a cosine."""
    AcceleratorState._reset_state(reset_partial_state=True)
    state = build_state(load_config("tiny", [*SMALL, "train.learning_rate=1e-3"]))
    parameters = list(state.policy.trainable().values())
    size = sum(parameter.numel() for parameter in parameters)
    slope, other = torch.randn(2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = [parameter.detach().clone() for parameter in parameters]

    def sampled(*_: object) -> SimpleNamespace:
        flat = torch.cat([parameter.detach().flatten() for parameter in parameters]).double()
        return SimpleNamespace(rewards=np.full(4, -float(flat @ slope)))

    monkeypatch.setattr(progress, "collect", sampled)
    means = {("star", "none"): 3 * slope.float(), ("uniform", "none"): other.float()}
    means["shuffled", "none"] = torch.zeros(size)
    draw = load_prompts(state.config.prompts)[0]
    found = progress.measure_progress(state, draw, None, means, 2, [10.0], lambda prompts: list(prompts))
    along, aside = found.rows
    assert found.failure is None and (along.arm, aside.arm, aside.n) == ("star", "uniform", 2)
    assert along.length == aside.length == pytest.approx(1e-2 * math.sqrt(size))
    assert along.gain == pytest.approx(along.length * float(slope.norm()), rel=1e-4)
    assert aside.gain == pytest.approx(aside.length * float(slope @ other / other.norm()), rel=1e-2, abs=1e-2)
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))

    calls = []

    def fails(*_: object) -> SimpleNamespace:
        calls.append(None)
        if len(calls) == 8:  # of the third batch, away from the first weights
            raise RewardError("no answer")
        return sampled()

    monkeypatch.setattr(progress, "collect", fails)
    ended = progress.measure_progress(state, draw, None, means, 9, [10.0], lambda prompts: list(prompts))
    assert isinstance(ended.failure, RewardError)
    assert [(row.gain, row.n) for row in ended.rows] == [(row.gain, 2) for row in found.rows]
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("lengths", ["0", "1,1", "1.2.3", "", "-1", "1,,2"])
def test_lengths_of_steps_that_cannot_be_are_refused(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "--progress", "2", f"--progress-lengths={lengths}"]) == 2
    assert "--progress-lengths: expected numbers above 0" in capsys.readouterr().err
    assert main(["tiny", "--progress-lengths=1"]) == 2
    assert "--progress-lengths: expected none without --progress" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "ended_by", "code"),
    [(4, KeyboardInterrupt(), 0), (3, KeyboardInterrupt(), 130), (4, RewardError("no answer"), 2)],
)
def test_what_was_measured_before_an_interrupt_or_a_fault_counts(
    batch: int,
    ended_by: BaseException,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    calls = []

    def collect_or_stop(*arguments):
        calls.append(arguments)
        if len(calls) == batch:
            raise ended_by
        return collect(*arguments)

    monkeypatch.setattr("star_trainer.studies.sensitivity.gradients.collect", collect_or_stop)
    parts = ["--parts", "gradients", "--arms", "star,uniform", "--batches", "20"]
    parts += ["--progress", "2"]
    monkeypatch.setattr(progress, "collect", lambda *_: pytest.fail("goes on after it was stopped"))
    half = ["--arm", "half: allocation.strength=0.5"]
    assert main(["tiny", *SMALL, f"run.folder={tmp_path / 'run'}", *parts, *half, "--folder", str(tmp_path)]) == code
    assert ("no answer" in capsys.readouterr().err) == (code == 2)
    result = tmp_path / "sensitivity.json"
    if batch == 3:
        assert not result.exists()
    else:
        content = json.loads(result.read_text())
        assert {signal["batches"] for signal in content["gradients"]} == {3}
        found = {signal["arm"]: signal for signal in content["gradients"] if signal["step"] == "all"}
        # Half of each: the mean square of its length differs from both, and is at most the mean of the two.
        squares = {name: signal["covariance_trace"] + signal["squared_mean"] for name, signal in found.items()}
        assert squares["half"] < (squares["star"] + squares["uniform"]) / 2
        assert abs(squares["half"] / squares["uniform"] - 1) > 0.05 < abs(squares["half"] / squares["star"] - 1)
        assert found["half"]["ratio_less_star"] is not None and content["arms"]["half"]["strength"] == [0.5]


def test_parts_that_are_there_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tiny", *SMALL, f"run.folder={tmp_path / 'run'}", "--prompts", "6", "--folder", str(tmp_path)]
    arms = ["--arms", "star,uniform", "--arm", "half: allocation.strength=0.5", "--batches", "3", "--progress", "2"]

    def measured(*more: str) -> dict[str, object]:
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main([*arguments, *more]) == 0
        return json.loads((tmp_path / "sensitivity.json").read_text())

    first = measured("--parts", "gradients", *arms)
    second = measured("--parts", "objects")
    third = measured("--parts", "edits")
    assert second["steps"] == third["steps"] == first["steps"] != []
    assert second["progress"] == third["progress"] == first["progress"] != []
    assert second["gradients"] == third["gradients"] == first["gradients"] and third["arms"] == first["arms"]
    assert first["scores"] == [] and second["scores"] == third["scores"][: len(second["scores"])]
    table = (tmp_path / "sensitivity.md").read_text()
    assert (
        "| half | all |" in table
        and "| weights of the steps | step 1 |" in table
        and "object AUROC" in table
        and "reward lost inside" in table
    )
    before = (tmp_path / "sensitivity.json").read_bytes()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*arguments, "rollout.eta=0.5", "--parts", "objects"]) == 2
    assert "--folder" in capsys.readouterr().err and (tmp_path / "sensitivity.json").read_bytes() == before


def test_a_differentiable_reward_is_compared_by_its_gradient(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    reward = ["reward.terms={clip_score: 1.0}", "reward.models.clip=tiny"]
    arguments = ["tiny", *SMALL, *reward, f"run.folder={tmp_path / 'run'}", "--prompts", "6", "--parts", "edits"]
    assert main([*arguments, "--folder", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "sensitivity.json").read_text())["scores"]
    found = [score for score in scores if score["what"] == "correlation with the reward's gradient"]
    assert {score["map"] for score in found} == {"map", "wrong prompt", "text-blind"}
    assert all(score["n"] == 6 and -1.0 <= score["value"] <= 1.0 for score in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "everything"], "--parts"),
        (["--arms", "best"], "--arms"),
        (["rollout.prompts=1", "--parts", "gradients"], "rollout.prompts"),
        (["--arm", "half"], "--arm"),
        (["--arm", "star: allocation.strength=0.5"], "--arm"),
        (["--arm", "short: rollout.steps=5"], "--arm: short"),
        (["--arm", "even: method=uniform"], "--arm: even"),
        (["--arm", "same:"], "--arm: same"),
        (["--arm", "half: allocation.strength=2"], "--arm: half: command line: allocation.strength"),
        (["--arm", "deep: allocation.layers=[9]", "--parts", "gradients"], "--arm: deep: allocation.layers"),
        (["--arm", "half: allocation.strength=0.5", "--parts", "edits"], "--arm"),
        (["--prompts", "1"], "--prompts"),
        (["--batches", "2"], "--batches"),
        (["--share", "1"], "--share"),
        (["prompts.source=a.jsonl", "prompts.held_out=b.jsonl", "units=rules"], "--parts"),
        (["train.iterations=-1"], "train.iterations"),
        (["--trained", "run.folder=nowhere/at_all", "--parts", "objects"], "run.folder"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
