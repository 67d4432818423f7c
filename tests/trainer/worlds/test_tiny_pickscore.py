"""The preference model that comes with the package: PickScore's format, a rater's choices, and better scenes first."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from star_trainer.config import Reward, load_config
from star_trainer.config.paths import TINY_PICKSCORE
from star_trainer.rewards import load_reward
from star_trainer.rewards.models.clip import ClipModel
from star_trainer.worlds.scenes.captions import is_held_out, sample_prompts
from star_trainer.worlds.scenes.renderer import render, sample_scene
from star_trainer.worlds.scenes.tiny_pickscore.build import RATER, Pairs, measure, rate, siblings

TINY = Reward.model_validate(
    {"terms": {"pickscore": 1.0}, "models": {"pickscore": "tiny", "pickscore_processor": "tiny"}}
)


@pytest.fixture(scope="module")
def model() -> ClipModel:
    return ClipModel("tiny", key="reward.models.pickscore")


@pytest.fixture(scope="module")
def stated() -> dict[str, dict[str, float]]:
    lines = (TINY_PICKSCORE.parent / "build_log.jsonl").read_text().splitlines()
    return {entry["stage"]: entry for entry in map(json.loads, lines)}


def test_the_folder_is_of_transformers_and_takes_at_most_one_and_a_half_mb(model: ClipModel) -> None:
    files = [path for path in TINY_PICKSCORE.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json"}
    assert sum(path.stat().st_size for path in files) <= 1_500_000
    assert type(model.model).__name__ == "CLIPModel"
    other = ClipModel("tiny", key="reward.models.clip")
    assert not torch.equal(model.model.visual_projection.weight, other.model.visual_projection.weight)


def test_the_log_states_what_the_readme_says(stated: dict[str, dict[str, float]]) -> None:
    card = (TINY_PICKSCORE.parent / "README.md").read_text()
    for stage in ("before", "after"):
        assert f"{stated[stage]['prefers_what_meets_more_pipeline']:.3f}" in card
        assert f"{stated[stage]['agrees_with_rater']:.3f}" in card
    after = stated["after"]
    assert 0.7 < after["agrees_with_rater"] <= after["rater_is_right"] + 0.02


def test_the_score_is_the_models_logit(model: ClipModel) -> None:
    rng = np.random.default_rng(0)
    prompts = sample_prompts(rng, 4, held_out=True)
    images = np.stack([render(sample_scene(prompt.metadata, rng), rng) for prompt in prompts])
    found = load_reward(TINY)(images, prompts)
    cosines = (model.embed_images(images) * model.embed_texts([p.text for p in prompts])).sum(-1)
    np.testing.assert_allclose(found, model.logit_scale * cosines.double(), rtol=1e-5)


def test_a_scene_that_meets_the_prompt_scores_above_one_that_differs_in_one_attribute() -> None:
    rng = np.random.default_rng(3)
    prompts = sample_prompts(rng, 100, held_out=True, distinct=True)
    near = siblings(prompts, rng)
    better, worse = (
        np.stack([render(sample_scene(prompt.metadata, rng), rng) for prompt in some]) for some in (prompts, near)
    )
    reward = load_reward(TINY)
    assert (reward(better, prompts) > reward(worse, prompts)).mean() > 0.75


def test_the_rater_ties_what_is_alike_and_errs_as_often_as_stated() -> None:
    met = np.repeat([[1.0, 1.0], [1.0, 0.75], [0.5, 1.0]], 4000, axis=0)
    alike, first, second = np.split(rate(met, np.random.default_rng(0)), 3)
    assert (alike == 0.5).all()
    assert first.mean() == pytest.approx(1 / (1 + np.exp(-RATER / 4)), abs=0.02)
    assert second.mean() == pytest.approx(1 / (1 + np.exp(RATER / 2)), abs=0.02)


def test_accuracy_is_counted_over_pairs_that_are_not_tied() -> None:
    class Always:
        """Prefers whatever has a higher place."""

        pixels = staticmethod(lambda images: images[:, 0, :1, :1])
        embed_pixels = staticmethod(lambda pixels: torch.cat([pixels[:, :, 0], 1 - pixels[:, :, 0]], 1))
        embed_texts = staticmethod(lambda texts: torch.tensor([[1.0, 0.0]]).repeat(len(texts), 1))

    images = (torch.arange(8) * 30).byte().view(8, 1, 1, 1).expand(8, 3, 64, 64)
    prompt = sample_prompts(np.random.default_rng(0), 1, held_out=True)
    pair = np.array([[0, 1], [1, 0], [5, 4], [2, 3]])
    met = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 1.0], [1.0, 1.0]])
    choice = np.array([0.0, 0.0, 0.0, 0.5])
    found = measure(Always(), Pairs(prompt, images, np.zeros(4, dtype=int), pair, met, choice))  # type: ignore[arg-type]
    assert found["pairs"] == 3 and found["pairs_of_the_pipeline"] == 2
    # It prefers 1 to 0 both times, and 5 to 4: the rater, who chose the second image each time, says so once.
    assert found["agrees_with_rater"] == pytest.approx(1 / 3)
    assert found["prefers_what_meets_more"] == pytest.approx(2 / 3)
    assert found["rater_is_right"] == pytest.approx(2 / 3)


def test_the_build_sees_no_held_out_caption() -> None:
    rng = np.random.default_rng(0)
    training = sample_prompts(rng, 50, held_out=False, distinct=True)
    assert not any(is_held_out(prompt.text) for prompt in [*training, *siblings(training, rng)])


def test_the_preset_trains_on_it_and_is_judged_by_what_it_does_not_see() -> None:
    config = load_config("tiny_pickscore")
    assert list(config.reward.terms) == ["pickscore"] and config.reward.models.pickscore == "tiny"
    published = load_config("sd35m_pickscore").reward.terms["pickscore"]
    assert config.reward.terms["pickscore"] == published
    assert config.prompts.source == "scenes"
