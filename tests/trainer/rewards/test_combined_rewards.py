"""Several rewards as one: weights, floors, gates, and how their advantages are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from star_trainer.algorithms import r0
from star_trainer.algorithms.advantages import advantages_of, group_advantages
from star_trainer.config import Config, ConfigError, Reward, load_config
from star_trainer.prompts import Prompt
from star_trainer.rewards import counted, held_out_scorer, open_gates, weighted_sum
from star_trainer.train import train

PROMPTS = [Prompt("a cat", {})] * 4
IMAGES = np.zeros((4, 8, 8, 3), dtype=np.uint8)
OCR, PICK = np.array([0.2, 0.8, 0.9, 1.0]), np.array([20.0, -3.0, 21.0, 22.0])


def reward(**settings: Any) -> Reward:
    return Reward.model_validate({"terms": {"ocr": 2.0, "pickscore": 0.5}, **settings})


def config(**settings: Any) -> Config:
    return Config.model_validate({"rollout": {"samples": 4}, "reward": reward(**settings)})


def values() -> dict[str, np.ndarray]:
    return {"ocr": OCR, "pickscore": PICK}


def terms() -> dict[str, Any]:
    return {"ocr": lambda images, prompts: OCR, "pickscore": lambda images, prompts: PICK}


def test_a_term_counts_at_least_its_floor() -> None:
    found = counted(reward(floors={"pickscore": 19.0}), values())
    np.testing.assert_array_equal(found["pickscore"], [20.0, 19.0, 21.0, 22.0])
    np.testing.assert_array_equal(found["ocr"], OCR)


def test_a_closed_gate_leaves_the_floor_or_nothing() -> None:
    gates = {"pickscore": {"ocr": 0.8}}
    np.testing.assert_array_equal(open_gates(reward(gates=gates), values())["pickscore"], [False, True, True, True])
    np.testing.assert_array_equal(counted(reward(gates=gates), values())["pickscore"], [0.0, -3.0, 21.0, 22.0])
    found = counted(reward(gates=gates, floors={"pickscore": -5.0}), values())
    np.testing.assert_array_equal(found["pickscore"], [-5.0, -3.0, 21.0, 22.0])


def test_a_gate_of_several_conditions_wants_all_of_them() -> None:
    gates = {"ocr": {"ocr": 0.8, "pickscore": 0.0}}
    np.testing.assert_array_equal(counted(reward(gates=gates), values())["ocr"], [0.0, 0.0, 0.9, 1.0])


def test_gates_look_at_what_the_terms_gave_not_at_what_they_count() -> None:
    settings = {"floors": {"ocr": 0.85}, "gates": {"pickscore": {"ocr": 0.8}, "ocr": {"pickscore": 21.0}}}
    found = counted(reward(**settings), values())
    np.testing.assert_array_equal(found["pickscore"], [0.0, -3.0, 21.0, 22.0])
    np.testing.assert_array_equal(found["ocr"], [0.85, 0.85, 0.9, 1.0])


def test_the_sum_and_the_log_of_training() -> None:
    total = weighted_sum(reward(gates={"pickscore": {"ocr": 0.8}}), terms())
    np.testing.assert_allclose(total(IMAGES, PROMPTS), 2 * OCR + 0.5 * np.array([0.0, -3.0, 21.0, 22.0]))
    assert total.logged == ["reward_ocr", "reward_pickscore", "gate_pickscore"]
    np.testing.assert_allclose(total.take_totals(), [4.0, OCR.sum(), PICK.sum(), 3.0])


def test_held_out_images_get_the_same_sum_and_each_term_as_it_is() -> None:
    settings = {"prompts": {"source": "a.txt", "held_out": "b.txt"}, "reward": reward(floors={"pickscore": 0.0})}
    scores = held_out_scorer(Config.model_validate(settings), terms())(IMAGES, PROMPTS)
    np.testing.assert_allclose(scores["reward"], 2 * OCR + 0.5 * np.maximum(PICK, 0.0))
    np.testing.assert_array_equal(scores["pickscore"], PICK)


def each(groups: int = 3, size: int = 4) -> np.ndarray:
    """Terms [B, 2] of very different scale."""
    return np.random.default_rng(0).normal(size=(groups * size, 2)) * [1.0, 100.0] + [0.0, 500.0]


def test_sums_are_compared_as_one_reward_was() -> None:
    found = advantages_of(config(), each())
    np.testing.assert_array_equal(found.values, group_advantages(each() @ [2.0, 0.5], 4).values)


def test_normalised_terms_weigh_alike_whatever_their_scale() -> None:
    scaled = each() * [1.0, 1e-3]
    first, second = (advantages_of(config(normalize="batch"), e).values for e in (each(), scaled))
    np.testing.assert_allclose(first, second, rtol=1e-2, atol=1e-2)
    plain = [advantages_of(config(), e).values for e in (each(), scaled)]
    assert np.abs(plain[0] - plain[1]).max() > 0.5


def test_gdpo_sums_each_terms_own_advantage_and_divides_by_the_batch() -> None:
    groups = each().reshape(3, 4, 2)
    own = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-4)
    total = (own @ [2.0, 0.5]).reshape(-1)
    found = advantages_of(config(combine="advantages"), each())
    np.testing.assert_allclose(found.values, total / (total.std() + 1e-4), rtol=1e-9)
    assert found.kept.all() and found.dropped == 0.0


def test_gdpo_tells_apart_what_the_sum_cannot() -> None:
    """Of two terms of which one is met, then both: as sums the groups look alike."""
    two = np.array([[0, 0], [0, 1], [0, 0], [1, 1]] * 2, dtype=float)
    cfg = Config.model_validate({"rollout": {"samples": 2}, "reward": {"terms": {"ocr": 1.0, "pickscore": 1.0}}})
    apart = cfg.model_copy(update={"reward": cfg.reward.model_copy(update={"combine": "advantages"})})
    plain, gdpo = advantages_of(cfg, two).values, advantages_of(apart, two).values
    np.testing.assert_allclose(plain[1], plain[3], rtol=1e-3)
    assert gdpo[3] > 1.9 * gdpo[1]


def test_gdpo_keeps_groups_in_which_any_term_differs() -> None:
    terms = np.array([[1, 0], [1, 0], [1, 0], [1, 1]], dtype=float)
    found = advantages_of(
        Config.model_validate({"rollout": {"samples": 2}, "reward": reward(combine="advantages")}), terms
    )
    assert found.kept.tolist() == [False, False, True, True] and found.dropped == 0.5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("reward.floors.ocrr=1", "floors: expected some of the terms scene_graded .*got ocrr"),
        ("reward.gates.scene_graded={ocr: 1}", "gates: expected some of the terms"),
        ("reward.gates.scene_graded={}", "reward.gates.scene_graded: "),
        ("reward.combine=product", "reward.combine: "),
    ],
)
def test_settings_that_name_no_term_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("tiny", [override])


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="normalize: expected none where combine is advantages"):
        load_config("tiny", ["reward.combine=advantages", "reward.normalize=batch"])
    with pytest.raises(ConfigError, match="reward.combine: expected sum, and .* for the method r0"):
        load_config("tiny_r0", ["reward.combine=advantages"])


def test_r0_follows_no_gradient_of_a_term_whose_gate_is_closed_or_that_is_below_its_floor() -> None:
    settings = reward(floors={"ocr": 0.3}, gates={"pickscore": {"ocr": 0.9}})
    counts = r0._where_it_counts(settings, values())
    assert counts["ocr"].tolist() == [False, True, True, True]
    assert counts["pickscore"].tolist() == [False, False, True, True]


def test_r0s_gradient_at_the_images_stops_at_a_closed_gate() -> None:
    cfg = Config.model_validate({"method": "r0", "reward": {"terms": {"a": 1.0, "b": 1.0}, "gates": {"b": {"a": 0.5}}}})

    class Identity:
        @staticmethod
        def pixels(latents: torch.Tensor, decoder: Any) -> torch.Tensor:
            return latents

    rewards = {
        "a": lambda images, texts: images[:, 0].mean((1, 2)),
        "b": lambda images, texts: images[:, 1].mean((1, 2)),
    }
    latents = torch.zeros(2, 3, 8, 8)
    latents[1, 0] = 0.6
    supervision = r0.Supervision(rewards, cfg.reward.terms)
    _, gradient = r0._reward_gradient(cfg, Identity(), supervision, latents, PROMPTS[:2], None)  # type: ignore[arg-type]
    assert (gradient[:, 0] > 0).all()
    assert (gradient[0, 1] == 0).all() and (gradient[1, 1] > 0).all()


def test_a_run_with_a_gate_and_advantages_by_term_logs_both(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train(
        load_config(
            "tiny",
            [
                f"run.folder={tmp_path}",
                *("run.progress=false", "method=uniform", "train.iterations=1", "rollout.prompts=3"),
                *("rollout.samples=4", "rollout.steps=2", "rollout.sde_steps=1", "evaluation.prompts=2"),
                *("evaluation.interim_prompts=2", "evaluation.steps=2", "evaluation.pictures=1"),
                "reward.terms={scene_graded: 1, clip_score: 0.01, scene_strict: 0}",
                "reward.gates={clip_score: {scene_graded: 0.5}}",
                *("reward.combine=advantages", "reward.models.clip=tiny"),
            ],
        )
    )
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (trained,) = [entry for entry in entries if "train/gate_clip_score" in entry]
    # Of twelve images.
    assert 12 * trained["train/gate_clip_score"] == pytest.approx(round(12 * trained["train/gate_clip_score"]))
    assert {"train/reward_scene_graded", "train/reward_clip_score", "train/reward_scene_strict"} <= trained.keys()
    assert trained["train/updates"] >= 1 and trained["train/gradient_norm"] > 0
    assert any("eval/clip_score" in entry and "eval/reward" in entry for entry in entries)
