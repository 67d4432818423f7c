"""What a run says of units that its prompts do not contain, and of held-out prompts that come again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from star_trainer.cli import main
from star_trainer.run import evaluation
from star_trainer.run.evaluation import Evaluation, HeldOut
from star_trainer.run.statistics import PairedDifference, paired_difference


def test_as_many_pictures_are_compared_as_both_evaluations_have(tmp_path: Path) -> None:
    few, more = (Evaluation(np.zeros((n, 8, 8, 3), np.uint8), {"graded": np.zeros(4)}) for n in (1, 2))
    for before, after in ((few, more), (more, few)):
        evaluation.draw_comparison(["a", "b"], before, after, "graded", tmp_path / "sheet.png")
        assert (tmp_path / "sheet.png").is_file()


def test_a_run_counts_units_without_tokens_and_distinct_held_out_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[list[str]] = []

    def compare(before: np.ndarray, after: np.ndarray, texts: list[str]) -> PairedDifference:
        compared.append(texts)
        return paired_difference(before, after, texts)

    monkeypatch.setattr(evaluation, "paired_difference", compare)
    prompts = [
        ("a red circle", ["red circle"]),
        ("a blue square", ["blaues Quadrat"]),
        ("빨간 원이 있다", ["있다", "원"]),
    ]
    lines = [json.dumps({"prompt": text, "units": units}) + "\n" for text, units in prompts]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    (tmp_path / "h.jsonl").write_text("".join(line for line in lines for _ in range(2)))
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path / "run"
    arguments = [
        *("tiny", f"run.folder={folder}", "run.progress=false", "train.iterations=1", "train.updates=1"),
        *("units=file", f"prompts.source={tmp_path}/p.jsonl", f"prompts.held_out={tmp_path}/h.jsonl"),
        *("rollout.prompts=3", "rollout.samples=2", "rollout.steps=2", "rollout.sde_steps=1", "evaluation.steps=1"),
        *("evaluation.prompts=6", "evaluation.interim_prompts=6", "evaluation.pictures=1"),
        *("model.max_sequence_length=16", "reward.terms={clip_score: 1.0}", "reward.models.clip=tiny"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 text units do not stand in their prompt" in printed and "'blaues Quadrat' in" in printed
    assert "50% of this iteration's text units have no token, and 33% of its prompts no unit" in printed
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (trained,) = [entry for entry in entries if "train/loss" in entry]
    assert trained["train/units_missing"] == 0.5
    assert trained["train/prompts_without_units"] == pytest.approx(1 / 3)

    summary = json.loads((folder / "summary.json").read_text())
    base = Evaluation.load(folder / "base_evaluation.safetensors")
    assert base is not None and len(base) == summary["held_out_prompts"] == 6
    # Six images of three prompts: the interval is that of three.
    assert compared and all(texts == [text for text, _ in prompts for _ in range(2)] for texts in compared)
    difference = summary["difference"]["reward"]
    assert difference["mean"] == pytest.approx(summary["final"]["reward"] - summary["base"]["reward"], abs=1e-6)
    assert summary["held_out_distinct_prompts"] == 3


def test_images_of_one_prompt_count_once() -> None:
    generator = np.random.default_rng(0)
    texts = [str(number) for number in range(50)]
    effect = generator.normal(0, 1, 50)
    before, after = np.zeros(200), np.repeat(effect, 4) + generator.normal(0, 0.1, 200)
    order = generator.permutation(200)
    once = paired_difference(np.zeros(50), after.reshape(50, 4).mean(1))
    found = paired_difference(before[order], after[order], [texts[place // 4] for place in order])
    assert vars(found) == pytest.approx(vars(once))
    apart, alone = paired_difference(before, after), paired_difference(before, after, ["same"] * 200)
    assert found.high - found.low > 1.8 * (apart.high - apart.low)
    assert alone.mean == apart.mean and np.isnan([alone.low, alone.high, alone.p_value]).all()


def test_prompts_that_come_unequally_often_weigh_as_their_images_do() -> None:
    # Of draws with a known spread: 20 prompts once and 10 five times, whose images have all but the same difference.
    generator = np.random.default_rng(1)
    texts = [str(number) for number in range(20)] + [str(20 + number // 5) for number in range(50)]
    found = []
    for _ in range(400):
        effect = generator.normal(0.3, 1, 30)
        after = np.array([effect[int(text)] for text in texts]) + generator.normal(0, 0.1, 70)
        difference = paired_difference(np.zeros(70), after, texts)
        assert difference.mean == pytest.approx(after.mean())
        found.append(difference.low < 0.3 < difference.high)
    assert 0.88 < np.mean(found) <= 0.98


@pytest.mark.parametrize(
    ("names", "told_by"),
    [(["strict", "graded", "reward"], 1), (["reward", "geneval_graded", "geneval_strict"], 2), (["reward"], 0)],
)
def test_a_run_is_watched_by_a_score_that_is_not_trained_on(names: list[str], told_by: int) -> None:
    held_out = HeldOut.__new__(HeldOut)  # it needs no run for this
    images = np.zeros((0, 8, 8, 3), dtype=np.uint8)
    held_out.base = Evaluation(images, {name: np.full(4, place) for place, name in enumerate(names)})
    held_out.latest = Evaluation(images, {name: np.full(2, place + 0.5) for place, name in enumerate(names)})
    assert held_out.watched() == (told_by, told_by + 0.5)
