"""Held-out images are scored by every term, and by GenEval's own measure with its tags."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from star_trainer.config import Config, Reward
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardError, held_out_scorer, held_out_terms, load_terms, weighted_sum
from star_trainer.run.evaluation import Evaluation, HeldOut
from star_trainer.run.pictures import curves_figure

PROMPTS = [Prompt("a cat", {"tag": "colors"}), Prompt("two cats", {"tag": "counting"}), Prompt("x", {"tag": "colors"})]
IMAGES = np.zeros((3, 4, 4, 3), dtype=np.uint8)


def constant(*values: float) -> Any:
    return lambda images, prompts: np.array(values)


def config(**terms: float) -> Config:
    return Config.model_validate({"prompts": {"source": "a.txt", "held_out": "b.txt"}, "reward": {"terms": terms}})


@pytest.mark.parametrize(
    ("terms", "scored", "names"),
    [
        ({"ocr": 2.0}, ["ocr"], ["reward"]),
        ({"ocr": 2.0, "pickscore": 1.0}, ["ocr", "pickscore"], ["reward", "ocr", "pickscore"]),
        ({"geneval_graded": 2.0}, ["geneval_graded", "geneval_strict"], ["reward", "geneval_graded", "geneval_strict"]),
        ({"geneval_strict": 2.0}, ["geneval_strict"], ["reward", "geneval_strict"]),
    ],
)
def test_terms_are_scored_by_themselves(terms: dict[str, float], scored: list[str], names: list[str]) -> None:
    assert held_out_terms(Reward(terms=terms)) == scored
    values = {name: constant(place, 1.0, 0.5) for place, name in enumerate(scored)}
    found = held_out_scorer(config(**terms), values)(IMAGES, PROMPTS)
    assert list(found) == names
    expected = sum(weight * values[name](IMAGES, PROMPTS) for name, weight in terms.items())
    np.testing.assert_array_equal(found["reward"], expected)


def test_genevals_measure_is_shown_by_tag_and_not_drawn_as_curves_of_their_own() -> None:
    held_out = HeldOut(SimpleNamespace(config=config(geneval_graded=1.0)), PROMPTS, lambda images, prompts: {})
    held_out.base = Evaluation(IMAGES, {"reward": np.ones(3), "geneval_strict": np.array([1.0, 0.0, 0.0])})
    assert held_out.by_tag(held_out.base) == {"colors": 0.5, "counting": 0.0}
    assert held_out.shown == "reward" and held_out.watched() is None
    # Of fewer prompts, and without GenEval.
    assert held_out.by_tag(Evaluation(IMAGES, {"geneval_strict": np.ones(1)})) == {"colors": 1.0}
    assert held_out.by_tag(Evaluation(IMAGES, {"reward": np.ones(3)})) == {}
    figure = curves_figure([{"iteration": 0, "eval/reward": 0.1, "eval/geneval_strict/colors": 0.5}])
    assert len(figure.axes[0].lines) + len(figure.axes[0].collections) == 1


def test_a_weighted_sum_knows_what_each_term_gave() -> None:
    reward = weighted_sum(
        Reward(terms={"b": 2.0, "a": 1.0}), {"a": constant(1.0, 2.0, 3.0), "b": constant(0.0, 1.0, 1.0)}
    )
    for _ in range(2):
        np.testing.assert_array_equal(reward(IMAGES, PROMPTS), [1.0, 4.0, 5.0])
    np.testing.assert_array_equal(reward.take_totals(), [6.0, 4.0, 12.0])
    np.testing.assert_array_equal(reward.take_totals(), [0.0, 0.0, 0.0])


def test_a_term_that_does_not_return_is_given_up_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    monkeypatch.setattr("tests.tiny_reward_models.forever", lambda images, prompts: forever.wait(), raising=False)
    name = "tests.tiny_reward_models:forever"
    (term,) = load_terms(Reward(terms={name: 1.0}, timeout=0.2)).values()
    with pytest.raises(RewardError, match=rf"reward {name}: no answer within 0.2 s \(reward.timeout\)"):
        term(IMAGES, PROMPTS)
    forever.set()
