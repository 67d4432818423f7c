"""How images form: what is kept of the steps, and what single units' maps have to do with the map of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from star_trainer.config import load_config
from star_trainer.families.policy import Policy, load_policy
from star_trainer.prompts import Prompt
from star_trainer.report import ALL_WORDS, MOST_PROMPTS
from star_trainer.run.denoising import Watched, watch_denoising
from star_trainer.run.randomness import stream
from star_trainer.sampling import denoise, text_units

PROMPTS = [
    Prompt("a photo of a red circle and a blue square", {}, ("red circle", "blue square", "a green cross")),
    Prompt("a photo of a red circle", {}, ("red circle",)),
]


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    return load_policy(load_config("tiny").model)


def watched(policy: Policy, prompts: list[Prompt], *settings: str, maps: bool = True) -> Watched:
    config = load_config("tiny", ["rollout.sde_steps=1", "allocation.sharpness=1.0", *settings])
    noise = [stream(0, "test", place) for place in range(len(prompts))]
    return watch_denoising(policy, config, prompts, noise, 1.0, steps=config.rollout.steps, maps=maps)


@pytest.mark.parametrize("kind", ["step", "geometric"])
def test_maps_of_single_units_make_up_the_map_of_all(policy: Policy, kind: str) -> None:
    found = watched(policy, PROMPTS, "rollout.steps=2", f"allocation.map={kind}")
    shown = found.denoising(policy)
    both, one = shown.maps
    # What is not in the prompt has no map.
    assert list(both) == [ALL_WORDS, "red circle", "blue square"] and list(one) == [ALL_WORDS, "red circle"]
    for maps in shown.maps:
        for values in maps.values():
            assert values.shape == (2, *policy.grid)
            np.testing.assert_allclose(values.mean((-2, -1)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(one["red circle"], one[ALL_WORDS], rtol=1e-5)
    if kind == "step":
        mean = (both["red circle"] + both["blue square"]) / 2
        np.testing.assert_allclose(mean, both[ALL_WORDS], rtol=1e-4, atol=1e-5)
    config = load_config("tiny", ["rollout.sde_steps=1", "allocation.sharpness=1.0", f"allocation.map={kind}"])
    trajectory = denoise(
        policy,
        policy.encode([prompt.text for prompt in PROMPTS]),
        steps=2,
        kind="ode",
        generator=[stream(0, "test", place) for place in range(2)],
        units=text_units(policy, PROMPTS),
        allocation=config.allocation,
    )
    assert found.weights is not None and trajectory.weights is not None
    np.testing.assert_allclose(found.weights, trajectory.weights.transpose(0, 1), rtol=1e-5)
    np.testing.assert_array_equal(found.images, policy.decode(trajectory.latents[-1]))


def test_of_many_steps_twelve_are_kept_and_of_many_prompts_the_images_alone(policy: Policy) -> None:
    prompts = [PROMPTS[1]] * (MOST_PROMPTS + 1)
    seen = watched(policy, prompts, "rollout.steps=14", maps=False)
    found = seen.denoising(policy)
    assert found.steps[0] == 1 and found.steps[-1] == 14 and len(found.steps) == len(found.levels) == 12
    assert [len(pictures) for pictures in found.pictures] == [12] * MOST_PROMPTS + [1]
    assert seen.weights is None and not found.has_maps and seen.images.shape == (len(prompts), 64, 64, 3)
    # What an early step predicts is far from the image, what a late one does is near.
    early, late = (np.abs(found.pictures[0][step].astype(int) - seen.images[0]).mean() for step in (0, -2))
    assert late < early / 2


def test_no_more_samples_at_a_time_than_a_rollout_has_and_the_same_images(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*PROMPTS, PROMPTS[0]]
    whole = watched(policy, prompts, "rollout.steps=2")
    sizes: list[int] = []
    for name in ("predict", "decode"):
        call = getattr(policy, name)

        def counted(latents: torch.Tensor, *rest: Any, call: Callable[..., Any] = call) -> Any:
            sizes.append(len(latents))
            return call(latents, *rest)

        monkeypatch.setattr(policy, name, counted)
    batched = watched(policy, prompts, "rollout.steps=2", "rollout.batch_size=2")
    before, after = whole.denoising(policy), batched.denoising(policy)
    # Two steps of each batch, its images, and later the picture that the first step predicts; of the whole the latter.
    assert sizes == [2, 2, 2, 1, 1, 1, 3, 2, 1]
    assert np.abs(whole.images.astype(int) - batched.images).max() <= 1
    for one, other in zip(before.maps, after.maps, strict=True):
        assert list(one) == list(other)
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)
    assert [pictures.shape for pictures in after.pictures] == [(2, 64, 64, 3)] * 3


def test_a_unit_with_the_name_of_all_does_not_hide_the_map_of_all(policy: Policy) -> None:
    prompt = Prompt("all words are a red circle", {}, (ALL_WORDS, "red circle"))
    seen = watched(policy, [prompt], "rollout.steps=2")
    (maps,) = seen.denoising(policy).maps
    assert list(maps) == [ALL_WORDS, "red circle"] and seen.weights is not None
    np.testing.assert_array_equal(maps[ALL_WORDS], seen.weights[0])
