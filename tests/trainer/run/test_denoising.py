"""How images form: what is kept of the steps, and what single units' maps have to do with the map of all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from star_trainer.config import load_config
from star_trainer.families.policy import Policy, load_policy
from star_trainer.prompts import Prompt
from star_trainer.report import ALL_WORDS, MOST_PROMPTS, Denoising
from star_trainer.run.denoising import watch_denoising
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


def watched(policy: Policy, prompts: list[Prompt], *settings: str, maps: bool = True) -> Denoising:
    config = load_config("tiny", ["rollout.sde_steps=1", "allocation.sharpness=1.0", *settings])
    noise = [stream(0, "test", place) for place in range(len(prompts))]
    return watch_denoising(policy, config, prompts, noise, 1.0, steps=config.rollout.steps, maps=maps)


@pytest.mark.parametrize("kind", ["step", "geometric"])
def test_maps_of_single_units_make_up_the_map_of_all(policy: Policy, kind: str) -> None:
    found = watched(policy, PROMPTS, "rollout.steps=2", f"allocation.map={kind}")
    both, one = found.maps
    # What is not in the prompt has no map.
    assert list(both) == [ALL_WORDS, "red circle", "blue square"] and list(one) == [ALL_WORDS, "red circle"]
    for maps in found.maps:
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
    found = watched(policy, prompts, "rollout.steps=14", maps=False)
    assert found.steps[0] == 1 and found.steps[-1] == 14 and len(found.steps) == len(found.levels) == 12
    assert [len(pictures) for pictures in found.pictures] == [12] * MOST_PROMPTS + [1]
    assert found.weights is None and found.images.shape == (len(prompts), 64, 64, 3)
    # What an early step predicts is far from the image, what a late one does is near.
    early, late = (np.abs(found.pictures[0][step].astype(int) - found.images[0]).mean() for step in (0, -2))
    assert late < early / 2
