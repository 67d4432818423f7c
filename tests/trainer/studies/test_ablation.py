"""star-ablate: runs are made once, in any order and number, and differences are those of an independent computation."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from star_trainer.config import ConfigError
from star_trainer.run.statistics import student_mean
from star_trainer.studies.ablation import runs as runs_module
from star_trainer.studies.ablation.cli import main
from star_trainer.studies.ablation.plan import Comparison, read_plan
from star_trainer.studies.ablation.results import Curve, compare, markdown
from star_trainer.studies.ablation.runs import Run, places, plan_runs, run_all
from star_trainer.studies.ablation.training import Training, answers, common_reward, holm, training_blocks
from star_trainer.studies.arms import Arm

HERE = Path(__file__).parent
SMALL = [
    "train.iterations=2",
    "rollout.prompts=2",
    "rollout.samples=2",
    "rollout.batch_size=4",
    "rollout.steps=2",
    "rollout.sde_steps=1",
    "evaluation.prompts=4",
    "evaluation.interim_prompts=4",
    "evaluation.steps=2",
    "evaluation.every=1",
    "evaluation.pictures=2",
]

# Stands for the trainer: logs what a run logs, slower for seed 1, and fails where it is told to.
STAND_IN = """
import json, sys, time
from pathlib import Path
from star_trainer.config import load_config
config = load_config("tiny", sys.argv[1:])
folder = Path(config.run.folder)
(folder / "config.json").write_text(config.model_dump_json())
with (folder / "starts").open("a") as file:
    file.write("x")
if config.train.max_gradient_norm == 7.0 and config.run.seed == 1:
    sys.exit("out of luck")
time.sleep(0.2 * config.run.seed)
score = 0.5 + 0.1 * (config.method == "star") + 0.01 * config.run.seed
lines = [{"iteration": 0, "eval/graded": 0.4, "eval/prompts": 4}]
for iteration in (1, 2):
    seconds = {f"seconds/{name}": 0.5 for name in ("rollout", "reward_wait", "update")}
    lines.append({"iteration": iteration, "reward/mean": score - 0.1, **seconds})
lines.append({"iteration": 2, "eval/graded": score, "eval/prompts": 4})
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(folder / "summary.json").write_text(json.dumps({"iterations": 2, "final": {"graded": score}}))
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "command", lambda run: [sys.executable, "-c", STAND_IN, *run.overrides])
    monkeypatch.setattr(runs_module, "_POLL", 0.05)


def test_runs_are_made_once_and_compared(stand_in: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tiny", *SMALL, "--methods", "star,uniform", "--seeds", "2", "--folder", str(tmp_path), "--jobs", "3"]
    assert main(arguments) == 0
    (tmp_path / "star" / "seed_1" / "report.html").touch()
    assert main(arguments) == 0
    assert re.findall('href="(?!data)([^"]*)"', (tmp_path / "report.html").read_text()) == ["star/seed_1/report.html"]
    assert "4 of 4 runs are done already" in capsys.readouterr().out
    assert [path.read_text() for path in sorted(tmp_path.glob("*/*/starts"))] == ["x"] * 4
    result = json.loads((tmp_path / "ablation.json").read_text())
    star, uniform = result["rows"]
    assert (star["arm"], uniform["arm"]) == ("star", "uniform")
    assert star["final"]["value"] == pytest.approx(0.605) and uniform["final"]["value"] == pytest.approx(0.505)
    assert star["final_difference"]["mean"] == pytest.approx(0.1) and uniform["final_difference"] is None
    assert star["area"]["value"] == pytest.approx((0.4 + 0.605) / 2)
    assert star["seconds_per_iteration"] == pytest.approx(1.5) and star["seconds_ratio"] == pytest.approx(1.0)
    assert result["runs"][0]["rollouts"] == [0, 8] and result["runs"][0]["seconds"] == pytest.approx([0.0, 3.0])
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    assert "| star | 2 | 0.6050" in (tmp_path / "ablation.md").read_text()
    # Other settings are other runs: what is there does not count as theirs.
    again = plan_runs("tiny", [*SMALL, "train.learning_rate=1e-5"], [Arm("star", ("method=star",))], [0], tmp_path)
    assert not again[0].is_done()


def test_a_failed_run_is_reported_and_the_others_are_compared(
    stand_in: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlucky = "odd: method=star train.max_gradient_norm=7.0"
    arguments = ["tiny", *SMALL, "--methods", "uniform", "--arm", unlucky, "--seeds", "2", "--folder", str(tmp_path)]
    assert main(arguments) == 1
    assert "odd, seed 1 failed: out of luck" in "".join(capsys.readouterr())
    result = json.loads((tmp_path / "ablation.json").read_text())
    assert result["failures"] == {"odd, seed 1": "out of luck"}
    assert {(row["arm"], row["final"]["n"]) for row in result["rows"]} == {("uniform", 2), ("odd", 1)}


@pytest.mark.parametrize("by_signal", [False, True])
def test_stopping_leaves_no_process_behind(
    by_signal: bool, stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(Run, "command", lambda run: endless)
    started = []
    real = runs_module._start

    def start(run, environment):
        started.append(real(run, environment))
        return started[-1]

    def interrupt(seconds: float) -> None:
        if not by_signal:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs_module, "_start", start)
    monkeypatch.setattr(runs_module.time, "sleep", interrupt)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_all(plan_runs("tiny", SMALL, [Arm("star", ())], [0, 1], tmp_path), places(2))
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.exhaustive
def test_the_command_trains_and_compares_for_real(tmp_path: Path) -> None:
    assert main(["tiny", *SMALL, "--methods", "star,uniform", "--seeds", "1", "--folder", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "ablation.json").read_text())
    assert {(row["arm"], row["score"]) for row in result["rows"]} == {
        (arm, score) for arm in ("star", "uniform") for score in ("strict", "graded")
    }
    assert all(run["iterations"] == [0, 1, 2] for run in result["runs"])
    first, second = (run["scores"]["graded"][0] for run in result["runs"])
    assert first == second, "the base model is the same for all methods"


def test_runs_of_before_that_left_no_page_are_compared_in_one(tmp_path: Path) -> None:
    kept = HERE.parents[2] / "docs" / "results" / "tiny_ablation_runs"
    for place in ("star/seed_0", "star/seed_1", "uniform/seed_0", "uniform/seed_1"):
        shutil.copytree(kept / place, tmp_path / place)
    arms = ["--methods", "uniform", "--arm", "star: method=star train.granularity=position"]
    assert main(["tiny", *arms, "--seeds", "2", "--compare", "--folder", str(tmp_path)]) == 0
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = json.loads((tmp_path / "ablation.json").read_text())["rows"][-1]["final_difference"]
    assert f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]" in content
    assert content.count("<svg") == 7 and "Runs</h2>" not in content


def curve(arm: str, seed: int, final: float) -> Curve:
    return Curve(arm, seed, [0, 1], [0, 4], [0.0, 1.0], {"graded": [0.0, final]}, {"graded": final}, 1.0)


PLAN = """
config: tiny
settings: [{settings}]
baseline: even
seeds: [0, 1, 2]
arms:
  even: method=uniform
  map: method=star train.learning_rate=2e-3
comparisons:
  - {{question: does the map help, arm: map, against: even}}
"""


def test_a_plan_is_read_from_a_file_and_what_is_there_is_compared(
    stand_in: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.format(settings=", ".join(SMALL)))
    arguments = [str(plan), "--folder", str(tmp_path / "runs")]
    assert main([*arguments, "--compare"]) == 1, "there is no run yet"
    assert main([*arguments, "--seeds", "2"]) == 0
    assert len(list(tmp_path.glob("runs/*/*/starts"))) == 4
    assert main([*arguments, "--compare"]) == 0
    assert len(list(tmp_path.glob("runs/*/*/starts"))) == 4, "nothing was run"
    result = json.loads((tmp_path / "runs" / "ablation.json").read_text())
    assert result["baseline"] == "even" and result["seeds"] == [0, 1, 2]
    assert result["config"]["train"]["iterations"] == 2
    (block,) = result["training"]
    assert (block["arm"], block["first"], block["last"], block["n"]) == ("map", 1, 2, 2)
    assert block["difference"] == pytest.approx(0.1) and block["error"] == pytest.approx(0.0, abs=1e-12)
    assert {answer["measure"] for answer in result["comparisons"]} == {
        "training reward from iteration 1",
        "held-out graded",
    }
    assert "does the map help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: tiny\narms: {a: method=star}\nseeds: [0]\nbaseline: b\n", "line 4: baseline: .*got 'b'"),
        ("config: tiny\narms: {a: method=star}\nseeds: [0, 0]\nbaseline: a\n", "seeds"),
        ("config: tiny\narms: {a b: method=star}\nseeds: [0]\nbaseline: a\n", "arms"),
        ("config: tiny\narms: {a: method=star}\nseeds: [0]\nbaseline: a\nruns: 3\n", "line 5: runs: unknown key"),
    ],
)
def test_a_plan_that_cannot_be_used_is_refused_by_its_key(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_plan(tmp_path / "plan.yaml", [])


def test_the_runs_that_the_repository_keeps_count(tmp_path: Path) -> None:
    """Also those made before some of today's settings existed, for what they were."""
    results = Path(__file__).parents[3] / "docs" / "results"
    arms = [Arm("uniform", ("method=uniform",)), Arm("star", ("method=star", "train.granularity=position"))]
    runs = plan_runs("tiny", [], arms, [0, 4], results / "tiny_ablation_runs")
    assert all(run.is_done() for run in runs)
    today = plan_runs("tiny", [], [Arm("star", ("method=star",))], [0], results / "tiny_ablation_runs")
    assert not today[0].is_done()
    planned = read_plan(results / "tiny_where_to_clip.yaml", [])
    assert [run.arm for run in plan_runs("tiny", planned.overrides, planned.arms, [0], tmp_path)] == [
        arm.name for arm in planned.arms
    ]


def test_training_rewards_are_compared_block_by_block_over_the_seeds_that_have_it() -> None:
    rng = np.random.default_rng(1)
    base, other = rng.normal(size=(3, 25)), rng.normal(size=(3, 25))
    runs = [Training("uniform", seed, base[seed].tolist()) for seed in range(3)]
    runs += [Training("star", seed, other[seed, : (25, 25, 12)[seed]].tolist()) for seed in range(3)]
    first, second, third = training_blocks(runs, "uniform")
    assert [(block.first, block.last, block.n) for block in (first, second, third)] == [
        (1, 10, 3),
        (11, 20, 2),
        (21, 25, 2),
    ]
    differences = (other - base)[:, :10].mean(1)
    assert first.difference == pytest.approx(differences.mean())
    assert first.error == pytest.approx(stats.sem(differences))


def test_the_common_reward_is_one_that_all_arms_reach() -> None:
    slow, fast = np.linspace(0.0, 0.5, 50), np.linspace(0.0, 1.0, 50)
    runs = [Training("slow", 0, slow.tolist()), Training("fast", 0, fast.tolist()), Training("fast", 1, [5.0] * 50)]
    level, reached = common_reward(runs)
    assert level == pytest.approx(slow[-10:].mean()) and reached["slow"] == 50
    assert reached["fast"] == 28, "the iteration whose ten last have the mean; seed 1 is not one of both"
    assert common_reward([Training("one", 0, [1.0]), Training("other", 1, [1.0])]) is None


def test_holm_is_the_published_procedure() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9]) and holm([0.7]) == [0.7]
    found = holm([0.01, float("nan"), 0.02])
    assert found[0] == pytest.approx(0.02) and np.isnan(found[1]) and found[2] == pytest.approx(0.02)


def test_questions_are_answered_by_paired_tests() -> None:
    rng = np.random.default_rng(2)
    values = {arm: dict(enumerate(rng.normal(size=4))) for arm in ("a", "b", "c")}
    asked = [Comparison(question="?", arm="a", against="b"), Comparison(question="??", arm="c", against="b")]
    found = answers(asked, {"reward": values})
    expected = [stats.ttest_rel(list(values[arm].values()), list(values["b"].values())).pvalue for arm in "ac"]
    assert [answer.difference.p_value for answer in found] == pytest.approx(expected)
    assert [answer.corrected for answer in found] == pytest.approx(holm(expected))
    (nothing,) = answers(asked[:1], {"reward": {"a": {0: 1.0}, "b": {0: 2.0}}})
    assert nothing.difference is None and nothing.n == 1 and np.isnan(nothing.corrected)


def test_intervals_and_tests_are_students() -> None:
    rng = np.random.default_rng(0)
    values = {arm: rng.normal(size=5) for arm in ("star", "uniform")}
    curves = [curve(arm, seed, values[arm][seed]) for arm in values for seed in range(5)]
    star, uniform = compare(curves, "uniform")
    interval = stats.t.interval(0.95, 4, values["star"].mean(), stats.sem(values["star"]))
    assert (star.final.low, star.final.high) == pytest.approx(interval)
    paired = stats.ttest_rel(values["star"], values["uniform"])
    assert star.final_difference is not None and uniform.final_difference is None
    assert star.final_difference.p_value == pytest.approx(paired.pvalue)
    assert star.area_difference is not None
    assert star.area_difference.mean == pytest.approx(star.final_difference.mean / 2)
    assert "±" in markdown([star], "uniform")


def test_pairs_are_those_of_the_same_seed() -> None:
    curves = [curve("uniform", seed, 0.1 * seed) for seed in (0, 1, 2)] + [
        curve("star", s, 0.1 * s + 1) for s in (2, 1)
    ]
    (_, star) = compare(curves, "uniform")
    assert star.final_difference is not None and star.final_difference.mean == pytest.approx(1.0)
    assert star.final.n == 2


def test_the_same_difference_in_every_seed_is_no_certainty() -> None:
    """Scores come in steps of one image: two equal differences say little, and an interval of width 0 would lie."""
    curves = [curve(arm, seed, 0.5 + 0.25 * (arm == "star")) for arm in ("uniform", "star") for seed in (0, 1)]
    (_, star) = compare(curves, "uniform")
    assert star.final_difference is not None and star.final_difference.mean == 0.25
    assert np.isnan([star.final_difference.low, star.final_difference.high, star.final_difference.p_value]).all()


def test_runs_stay_on_the_gpus_that_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runs_module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(None)] == ["4", "GPU-5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(3)] == ["0", "1", "0"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert {place["OMP_NUM_THREADS"] for place in places(2)} == {"3"}


def test_a_single_seed_has_no_interval() -> None:
    mean = student_mean([0.5])
    assert mean.value == 0.5 and np.isnan(mean.low) and mean.n == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "best"], "--methods"),
        (["--methods", "star,star"], "--methods"),
        (["--methods", ""], "--methods"),
        (["--arm", "no name"], "--arm"),
        (["--arm", "odd: allocation.strength=[0, 1, 2] train.updates=1"], "allocation.strength.2"),
        (["--arm", "odd: nonsense=1"], "odd: command line: nonsense"),
        (["--arm", "odd: run.seed=3"], "odd: run.seed"),
        (["run.folder=there"], "run.folder"),
        (["method=oracle"], "method"),
        (["--methods", "star,r0"], "r0: "),
        (["--arm", "odd: reward.terms.scene_strict=1"], "--arm"),
        (["--seeds", "many"], "--seeds"),
        (["--seeds", "0"], "--seeds"),
        (["--baseline", "best"], "--baseline"),
        (["--jobs", "0"], "--jobs"),
        (["train.iterations=-1"], "train.iterations"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
