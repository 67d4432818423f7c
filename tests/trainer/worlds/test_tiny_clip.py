"""The CLIP that comes with the package: real classes, a small folder, the right caption first, a gradient of use."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from star_trainer.config import Reward
from star_trainer.config.paths import TINY_CLIP, TINY_PIPELINE
from star_trainer.rewards import load_reward
from star_trainer.rewards.models.clip import ClipModel, ClipReward
from star_trainer.worlds.scenes.captions import is_held_out, sample_prompts
from star_trainer.worlds.scenes.renderer import render, render_background, sample_scene
from star_trainer.worlds.scenes.tiny_clip.build import (
    FAMILY,
    candidates,
    differ_in_one_attribute,
    families,
    meaning,
    measure,
)


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return ClipModel("tiny", key="reward.models.clip")


@pytest.fixture(scope="module")
def stated() -> dict[str, float]:
    lines = (TINY_CLIP.parent / "build_log.jsonl").read_text().splitlines()
    (entry,) = [json.loads(line) for line in lines if '"measure"' in line]
    return entry


def test_the_folder_is_of_transformers_and_takes_at_most_2_mb(clip: ClipModel) -> None:
    files = [path for path in TINY_CLIP.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json"}
    assert sum(path.stat().st_size for path in files) <= 2_000_000
    assert type(clip.model).__name__ == "CLIPModel" and type(clip.processor).__name__ == "CLIPProcessor"
    assert clip.model.dtype == torch.float32


def test_the_right_caption_of_32_comes_first_in_held_out_scenes(clip: ClipModel, stated: dict[str, float]) -> None:
    assert stated["scenes"] >= 1000
    assert stated["rank_first"] >= 0.8 and stated["rank_first_decoded"] >= 0.8
    vae = AutoencoderKL.from_pretrained(TINY_PIPELINE, subfolder="vae", torch_dtype=torch.float32)
    found = measure(clip, vae, 128, seed=7)
    for name in ("rank_first", "rank_first_decoded"):
        assert found[name] >= 0.8
    # Other scenes than those of the log: a difference of 0.12 is more than three standard errors.
    for name in ("rank_first_close", "rank_first_close_decoded"):
        assert found[name] == pytest.approx(stated[name], abs=0.12)


def test_the_32_captions_are_held_out_and_no_other_means_the_same_as_the_right_one() -> None:
    rng = np.random.default_rng(0)
    held_out = sample_prompts(rng, 200, held_out=True, distinct=True)
    for prompt in held_out[:20]:
        for close in (False, True):
            texts = candidates(prompt, held_out, rng, close=close)
            assert len(set(map(meaning, texts))) > 16 and len(set(texts)) == 32
            assert texts[0] == prompt.text and all(map(is_held_out, texts))
            assert [meaning(text) for text in texts].count(meaning(prompt.text)) == 1


def test_the_build_sees_no_held_out_caption() -> None:
    rng = np.random.default_rng(0)
    trained = families(sample_prompts(rng, 60, held_out=False), rng)
    assert len(trained) == 60 * FAMILY
    assert not any(is_held_out(prompt.text) for prompt in trained)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a red circle", "a blue circle", True),
        ("a red circle", "a red square", True),
        ("a red circle", "a blue square", False),
        ("a red circle and a blue square", "a blue circle and a red square", True),
        ("a red circle and a blue square", "a blue square and a red circle", False),
        ("a circle and a square", "a square and a circle", False),
        ("a circle left of a square", "a square left of a circle", True),
        ("a circle left of a square", "a circle above a square", True),
        ("a circle left of a square", "a square right of a circle", False),
        ("two red circles", "three red circles", True),
    ],
)
def test_captions_that_differ_in_one_attribute(first: str, second: str, expected: bool) -> None:
    assert differ_in_one_attribute(f"a photo of {first}", f"a photo of {second}") == expected


def test_the_reward_by_name_prefers_the_scene_that_was_asked_for() -> None:
    reward = load_reward(Reward(terms={"clip_score": 1.0}, models={"clip": "tiny"}))
    rng = np.random.default_rng(3)
    prompts = sample_prompts(rng, 40, held_out=True, distinct=True)
    images = np.stack([render(sample_scene(prompt.metadata, rng), rng) for prompt in prompts])
    right, wrong = reward(images, prompts), reward(images, prompts[1:] + prompts[:1])
    assert right.shape == (40,) and (right > wrong).mean() >= 0.9
    assert right.mean() > wrong.mean() + 20


def test_steps_along_the_gradient_raise_the_score_of_a_picture(clip: ClipModel) -> None:
    reward = ClipReward(clip, scale="percent")
    texts = [
        "a photo of a red circle",
        "a photo of a green square and a yellow triangle",
        "a photo of two blue crosses",
    ]
    rng = np.random.default_rng(0)
    images = torch.from_numpy(np.stack([render_background(rng) for _ in texts])).permute(0, 3, 1, 2).contiguous()
    before = reward.differentiable(images, texts)
    for _ in range(5):
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(reward.differentiable(images, texts).sum(), images)
        assert torch.isfinite(gradient).all() and (gradient != 0).flatten(1).any(1).all()
        images = (images + 0.02 * gradient.sign()).clamp(0, 1).detach()
    assert (reward.differentiable(images, texts) > before + 10).all()
