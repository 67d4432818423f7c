"""Denoising: parity with diffusers' pipeline, what is recorded, and independence of everything but the seed."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import star_trainer.algorithms.rollout as rollout_module
import torch
from star_trainer.algorithms.policy_gradient import choose_steps
from star_trainer.algorithms.rollout import collect, noisy_steps
from star_trainer.config import Config, Model, Reward, load_config
from star_trainer.families.policy import Policy, load_policy
from star_trainer.rewards import load_reward
from star_trainer.run.interruption import Interrupted
from star_trainer.run.randomness import numpy_stream, stream
from star_trainer.sampling import NonFiniteError, clean_latents, denoise, text_units
from star_trainer.worlds.scenes.captions import sample_prompts

LORA = load_config("tiny").model
# In the first iteration it begins at step 1.
WINDOW = ["rollout.sde_steps=null", "rollout.sde_window={size: 2, range: [0, 3]}"]


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    return load_policy(Model(pipeline="tiny", max_sequence_length=16, lora=LORA.lora))


@pytest.fixture(scope="module")
def prompts():
    return sample_prompts(np.random.default_rng(0), 4, held_out=True)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("steps", [4, 10])
def test_denoising_without_noise_equals_the_pipeline(
    policy: Policy, prompts, guidance_scale: float, steps: int
) -> None:
    texts = [prompt.text for prompt in prompts]
    trajectory = denoise(
        policy,
        policy.encode(texts),
        steps=steps,
        kind="ode",
        generator=stream(0, "test"),
        guidance_scale=guidance_scale,
    )

    def from_pipeline(output_type: str) -> torch.Tensor | np.ndarray:
        return policy.pipeline(
            texts,
            latents=trajectory.latents[0].clone(),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=16,
            output_type=output_type,
        ).images

    torch.testing.assert_close(trajectory.latents[-1], from_pipeline("latent"), rtol=1e-4, atol=1e-4)
    images = policy.decode(trajectory.latents[-1])
    assert np.abs(images / 255.0 - from_pipeline("np")).max() < 1e-4 * 10 + 0.5 / 255.0


def test_clean_latents_are_those_of_the_prediction_and_at_the_end_the_image(policy: Policy, prompts) -> None:
    conditioning = policy.encode([prompt.text for prompt in prompts])
    trajectory = denoise(policy, conditioning, steps=4, kind="ode", generator=stream(0, "test"))
    levels, timesteps = policy.schedule(4)
    for step in (0, 2):
        now = trajectory.latents[step]
        with torch.no_grad():
            velocity = policy.predict(now, timesteps[step], conditioning, policy.guidance(len(prompts), 1.0)).velocity
        expected = now - levels[step] * velocity
        torch.testing.assert_close(clean_latents(policy, trajectory, step), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clean_latents(policy, trajectory, 3), trajectory.latents[-1], rtol=1e-4, atol=1e-4)


def test_even_levels_are_the_pipelines_with_even_sigmas(policy: Policy, prompts) -> None:
    texts = [prompt.text for prompt in prompts]
    even = replace(policy, config=policy.config.model_copy(update={"levels": "even"}))
    assert even.schedule(4)[0].tolist() == pytest.approx([1.0, 9 / 11, 0.6, 1 / 3, 0.0])  # shift 1.5
    trajectory = denoise(even, even.encode(texts), steps=4, kind="ode", generator=stream(0, "test"))
    expected = policy.pipeline(
        texts,
        latents=trajectory.latents[0].clone(),
        sigmas=[1.0, 0.75, 0.5, 0.25],
        guidance_scale=1.0,
        max_sequence_length=16,
        output_type="latent",
    ).images
    torch.testing.assert_close(trajectory.latents[-1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_a_training_rollout_records_log_probs_and_maps_of_every_step(
    policy: Policy, prompts, guidance_scale: float
) -> None:
    config = load_config("tiny")
    trajectory = denoise(
        policy,
        policy.encode([prompt.text for prompt in prompts]),
        steps=3,
        kind="flow_sde",
        generator=stream(0, "test"),
        eta=0.7,
        guidance_scale=guidance_scale,
        units=text_units(policy, prompts),
        allocation=config.allocation,
    )
    assert trajectory.latents.shape == (4, 4, *policy.latent_shape)
    assert trajectory.log_prob is not None and trajectory.log_prob.shape == (3, 4, 16, 16)
    assert trajectory.weights is not None and trajectory.weights.shape == (3, 4, 8, 8)
    torch.testing.assert_close(trajectory.weights.mean((-1, -2)), torch.ones(3, 4), rtol=0, atol=1e-6)
    assert trajectory.weights.std() > 0


def test_each_step_has_its_strength_and_the_last_counts_for_those_after_it(policy: Policy, prompts) -> None:
    embeddings, units = policy.encode([prompt.text for prompt in prompts]), text_units(policy, prompts)

    def weights(strength: str) -> torch.Tensor:
        allocation = load_config("tiny", [f"allocation.strength={strength}"]).allocation
        options = {"steps": 4, "kind": "ode", "units": units, "allocation": allocation}
        maps = denoise(policy, embeddings, generator=stream(0, "test"), **options).weights
        assert maps is not None, "units were given"
        return maps

    whole, mixed = weights("1"), weights("[0, 1, 0.5]")
    assert torch.equal(mixed[0], torch.ones_like(mixed[0])) and torch.equal(mixed[1], whole[1])
    torch.testing.assert_close(mixed[2:], 0.5 + 0.5 * whole[2:])


def test_recording_changes_the_samples_by_rounding_only(policy: Policy, prompts) -> None:
    embeddings = policy.encode([prompt.text for prompt in prompts])
    options = {"steps": 3, "kind": "flow_sde", "eta": 0.7}
    plain = denoise(policy, embeddings, generator=stream(0, "test"), **options)
    recorded = denoise(
        policy,
        embeddings,
        generator=stream(0, "test"),
        units=text_units(policy, prompts),
        allocation=load_config("tiny").allocation,
        **options,
    )
    torch.testing.assert_close(recorded.latents, plain.latents, rtol=1e-4, atol=1e-4)


def test_the_embedding_of_a_text_does_not_depend_on_the_others(policy: Policy, prompts) -> None:
    texts = [prompt.text for prompt in prompts]
    together = policy.encode(texts).tensors["text"].clone()
    policy._cache.clear()
    assert torch.equal(policy.encode([texts[2]]).tensors["text"][0], together[2])


def test_embeddings_are_kept_up_to_the_size_that_is_set(prompts) -> None:
    small = load_policy(load_config("tiny", ["model.embedding_cache=1e-9"]).model)
    texts = [prompt.text for prompt in prompts]
    calls: list[str] = []
    real = small.pipeline.encode_prompt

    def counted(text, *args, **kwargs):
        calls.append(text)
        return real(text, *args, **kwargs)

    small.pipeline.encode_prompt = counted
    small.encode_ahead(texts)
    small.encode(texts)
    small.encode(texts[:1])
    assert calls == texts, "what was asked for together is kept together"
    small.encode([""])
    small.encode(texts[:1])
    assert calls == [*texts, "", texts[0]]


def test_a_sample_depends_neither_on_its_batch_nor_on_the_other_processes(policy: Policy) -> None:
    overrides = ["rollout.prompts=4", "rollout.samples=2", "rollout.steps=2", "rollout.sde_steps=null"]
    prompts = sample_prompts(numpy_stream(0, "prompts"), 4, held_out=False)
    reward = load_reward(Reward(terms={"scene_graded": 1.0}))
    with ThreadPoolExecutor(1) as worker:
        whole = collect(policy, load_config("tiny", [*overrides, "rollout.batch_size=8"]), prompts, reward, worker, 3)
        config = load_config("tiny", [*overrides, "rollout.batch_size=3"])
        # Of three processes the last has no third sample of its own, and draws one that counts nowhere.
        share = collect(policy, config, prompts, reward, worker, 3, np.array([2, 5, 8]))
    taken, expected = share.trajectory.latents[:, :2], whole.trajectory.latents[:, [2, 5]]
    torch.testing.assert_close(taken, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(taken[0], expected[0])
    assert share.prompts == [prompts[1], prompts[2], prompts[3]]
    np.testing.assert_array_equal(share.rewards[:2], whole.rewards[[2, 5]])
    given = share.conditioning_of(torch.tensor([1, 2])).tensors["text"]
    assert torch.equal(given, policy.encode([prompts[2].text, prompts[3].text]).tensors["text"])


def test_nan_in_the_latents_ends_the_rollout_with_step_and_sample(policy: Policy, prompts) -> None:
    embeddings = policy.encode([prompt.text for prompt in prompts])
    embeddings.tensors["text"][1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 0, in samples \[1\]"):
        denoise(policy, embeddings, steps=2, kind="ode", generator=stream(0, "test"))


def test_collecting_in_batches_keeps_groups_in_order_and_uses_the_worker(policy: Policy) -> None:
    config: Config = load_config(
        "tiny",
        ["rollout.prompts=2", "rollout.samples=3", "rollout.batch_size=4", "rollout.steps=2", "rollout.sde_steps=null"],
    )
    prompts = sample_prompts(numpy_stream(0, "prompts"), 2, held_out=False)
    seen: list[int] = []
    real = load_reward(Reward(terms={"scene_graded": 1.0}))

    def reward(images, batch):
        seen.append(len(images))
        return real(images, batch)

    with ThreadPoolExecutor(1) as worker:
        rollout = collect(policy, config, prompts, reward, worker, iteration=0)
    assert seen == [4, 2]
    assert [p.text for p in rollout.prompts] == [prompts[0].text] * 3 + [prompts[1].text] * 3
    assert rollout.rewards.shape == (6,) and rollout.trajectory.latents.shape[1] == 6
    images = policy.decode(rollout.trajectory.latents[-1])
    np.testing.assert_array_equal(rollout.rewards, real(images, rollout.prompts))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_signal_ends_a_rollout_but_where_other_processes_need_its_weights(
    sharded: bool, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["rollout.prompts=1", "rollout.samples=2", "rollout.steps=2", "rollout.sde_steps=null"]
    config = load_config("tiny", [*overrides, f"model.sharded={str(sharded).lower()}"])
    monkeypatch.setattr("star_trainer.run.interruption._asked", signal.SIGTERM)
    prompts = sample_prompts(numpy_stream(0, "prompts"), 1, held_out=False)
    with ThreadPoolExecutor(1) as worker, nullcontext() if sharded else pytest.raises(Interrupted):
        collect(policy, config, prompts, load_reward(Reward(terms={"scene_graded": 1.0})), worker, iteration=0)


@pytest.mark.parametrize("sampler", ["flow_sde", "cps"])
@pytest.mark.parametrize("overrides", [["rollout.sde_steps=2"], WINDOW], ids=["first steps", "window"])
def test_the_steps_that_draw_noise_are_those_that_are_trained_on(
    sampler: str, overrides: list[str], policy: Policy
) -> None:
    small = ["rollout.prompts=1", "rollout.samples=2", "rollout.steps=4", f"rollout.sampler={sampler}"]
    config, reward = load_config("tiny", [*small, *overrides]), load_reward(Reward(terms={"scene_graded": 1.0}))
    prompts = sample_prompts(numpy_stream(0, "prompts"), 1, held_out=False)
    with ThreadPoolExecutor(1) as worker:
        trajectory = collect(policy, config, prompts, reward, worker, iteration=0).trajectory
    expected = [1, 2] if overrides is WINDOW else [0, 1]
    assert [step for step, row in enumerate(trajectory.coefficients) if row.stochastic] == expected
    assert choose_steps(trajectory.coefficients, 1.0, np.random.default_rng(0)) == expected
    assert trajectory.first_noisy == expected[0]
    assert trajectory.log_prob is not None and trajectory.log_prob.shape[0] == 2
    # The others are Euler's.
    sigmas, timesteps = policy.schedule(4)
    embeddings = policy.encode([prompts[0].text]).repeat(2)
    for step in {0, 1, 2, 3} - set(expected):
        before, after = trajectory.latents[step], trajectory.latents[step + 1]
        with torch.no_grad():
            euler = before + (sigmas[step + 1] - sigmas[step]) * policy.velocity(before, timesteps[step], embeddings)
        torch.testing.assert_close(after, euler, rtol=1e-4, atol=1e-4)


def test_a_window_wanders_over_its_range_and_depends_on_seed_and_iteration_alone() -> None:
    config = load_config("tiny", [*WINDOW[:1], "rollout.sde_window={size: 3, range: [1, 6]}"]).rollout
    drawn = [noisy_steps(config, 0, iteration) for iteration in range(300)]
    starts = [steps.start for steps in drawn]
    assert all(len(steps) == config.noisy_steps == 3 for steps in drawn)
    # Each of the three places a third of the time: 100 of 300, standard deviation 8.
    assert set(starts) == {1, 2, 3} and all(70 < starts.count(start) < 130 for start in (1, 2, 3))
    assert drawn == [noisy_steps(config, 0, iteration) for iteration in range(300)]
    assert drawn != [noisy_steps(config, 1, iteration) for iteration in range(300)]


def test_groups_start_from_the_same_noise_where_shared_noise_says_so(policy: Policy) -> None:
    overrides = [
        "rollout.prompts=2",
        "rollout.samples=3",
        "rollout.batch_size=4",
        "rollout.steps=2",
        "rollout.sde_steps=null",
    ]
    config = load_config("tiny", [*overrides, "rollout.shared_noise=true"])
    prompts = sample_prompts(numpy_stream(0, "prompts"), 2, held_out=False)
    with ThreadPoolExecutor(1) as worker:
        rollout = collect(
            policy, config, prompts, load_reward(Reward(terms={"scene_graded": 1.0})), worker, iteration=0
        )
    start = rollout.trajectory.latents[0]
    assert torch.equal(start[0], start[1]) and torch.equal(start[3], start[5])
    assert not torch.equal(start[2], start[3])
    assert not torch.equal(rollout.trajectory.latents[-1][0], rollout.trajectory.latents[-1][1])


def test_the_reward_of_a_batch_is_computed_while_the_next_one_is_sampled(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["rollout.prompts=2", "rollout.samples=2", "rollout.batch_size=2", "rollout.steps=2"]
    config = load_config("tiny", [*overrides, "rollout.sde_steps=null"])
    second_batch = threading.Event()
    calls = 0
    real = rollout_module.denoise

    def watched(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            second_batch.set()
        return real(*args, **kwargs)

    overlapped = []

    def reward(images, batch):
        # The first batch's reward waits for the second batch to be on its way: without overlap it never is.
        overlapped.append(second_batch.wait(timeout=20))
        return np.zeros(len(images))

    monkeypatch.setattr(rollout_module, "denoise", watched)
    prompts = sample_prompts(numpy_stream(0, "prompts"), 2, held_out=False)
    with ThreadPoolExecutor(1) as worker:
        seconds = collect(policy, config, prompts, reward, worker, iteration=0).seconds
    assert overlapped == [True, True]
    # The first reward had its time while the second batch was sampled, the second one was waited for.
    assert 0 < seconds["reward_hidden"] < seconds["reward"]
    assert seconds["reward"] - seconds["reward_hidden"] <= seconds["reward_wait"]


def test_streams_are_told_apart_by_every_part_of_their_place() -> None:
    places = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 0, 0)]
    draws = {torch.randn(1, generator=stream(*place)).item() for place in places}
    assert len(draws) == len(places)
    assert torch.equal(torch.randn(3, generator=stream(0, "a", 4)), torch.randn(3, generator=stream(0, "a", 4)))


@pytest.mark.parametrize("sharded", [False, True])
def test_nan_waits_for_the_last_batch_where_others_need_the_weights_of_this_process(
    sharded: bool, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def not_finite(*args, **kwargs):
        batches.append(kwargs["generator"])
        raise NonFiniteError(f"batch {len(batches)}")

    monkeypatch.setattr(rollout_module, "denoise", not_finite)
    small = ["rollout.prompts=2", "rollout.samples=3", "rollout.batch_size=2", f"model.sharded={str(sharded).lower()}"]
    prompts = sample_prompts(numpy_stream(0, "prompts"), 2, held_out=False)
    reward = load_reward(Reward(terms={"scene_graded": 1.0}))
    with ThreadPoolExecutor(1) as worker, pytest.raises(NonFiniteError, match="batch 1"):
        collect(policy, load_config("tiny", small), prompts, reward, worker, iteration=0)
    assert len(batches) == (3 if sharded else 1)
