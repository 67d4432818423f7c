"""What is measured: a pipeline, the ways to allocate on it, and the trainer's own functions as calls to be timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

import star_kernels as sk
from star_kernels.recorder import recorder
from star_trainer.algorithms.advantages import group_advantages
from star_trainer.algorithms.policy_gradient import update
from star_trainer.algorithms.rollout import Rollout, collect
from star_trainer.config import Config, Model
from star_trainer.config.paths import TINY_PIPELINE
from star_trainer.families import read_shapes
from star_trainer.families.policy import freeze, load_policy
from star_trainer.prompts import Prompt
from star_trainer.prompts.units import UnitExtractor
from star_trainer.rewards import RewardFunction, load_reward
from star_trainer.run.inputs import load_prompts
from star_trainer.run.randomness import numpy_stream, stream
from star_trainer.run.state import TrainingState, build_state
from star_trainer.sampling import Trajectory, denoise, text_units
from star_trainer.studies.cost.attention import materialised, text_column_pass
from star_trainer.worlds.scenes.captions import sample_prompts

ROLLOUT_STEPS = 2
_UNFUSED = {"unfused": text_column_pass, "materialised": materialised}


@dataclass(frozen=True)
class Arm:
    """A method of the trainer, and how it is computed.

    fused: the kernels. unfused: plain PyTorch, its attention followed by a pass over the text columns. materialised:
    plain PyTorch, capturing from attention probabilities that are written out.
    """

    method: str
    variant: str = "fused"

    def __str__(self) -> str:
        return f"{self.method}, {self.variant}"

    @property
    def baseline(self) -> Arm:
        """What it is compared with: Flow-GRPO on the same kernels, or in plain PyTorch."""
        return Arm("uniform", "fused" if self.variant == "fused" else "unfused")


UNIFORM = Arm("uniform")
ROLLOUT_ARMS = (UNIFORM, Arm("star"), Arm("uniform", "unfused"), Arm("star", "unfused"), Arm("star", "materialised"))
# Nothing is captured in an update, so that materialising is no different from unfused there.
UPDATE_ARMS = (UNIFORM, Arm("uniform_position"), Arm("star"), Arm("uniform", "unfused"), Arm("star", "unfused"))
ITERATION_ARMS = (*UPDATE_ARMS, Arm("star", "materialised"))


@dataclass(frozen=True)
class Case:
    """A pipeline with its adapters, and the prompts of an iteration."""

    state: TrainingState
    prompts: list[Prompt]
    reward: RewardFunction

    def of(self, arm: Arm) -> TrainingState:
        """The state under the settings of an arm."""
        config = self.state.config
        backend = config.backend if arm.variant == "fused" else "reference"
        train = config.train
        if arm.method == "uniform_position":
            train = train.model_copy(update={"granularity": "position"})
        return self.under(config.model_copy(update={"method": arm.method, "backend": backend, "train": train})).state

    def under(self, config: Config) -> Case:
        """The same under other settings of rollout and update."""
        return replace(self, state=replace(self.state, config=config))

    @property
    def rollout_batch(self) -> int:
        """Samples of a forward pass of the rollout."""
        section = self.state.config.rollout
        return min(section.batch_size, section.prompts * section.samples)

    @property
    def update_groups(self) -> tuple[int, int]:
        """Prompts and samples of each that make up at most a backward pass of the update."""
        section = self.state.config.rollout
        samples = min(section.samples, max(2, self.state.config.train.batch_size))
        return min(section.prompts, max(1, self.state.config.train.batch_size // samples)), samples


def random_pipeline(config: Model, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline that `config` names, from its configuration alone, with random weights and embeddings.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    family, shapes = read_shapes(config.pipeline)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            # Which words a tokenizer knows changes no shape.
            pipeline = family.random_pipeline(shapes, TINY_PIPELINE / "tokenizer")
    finally:
        torch.set_default_dtype(default)
    freeze(pipeline)
    return pipeline


def load_case(config: Config, device: torch.device) -> Case:
    """The tiny pipeline as it is, with its prompts and reward; any other from its configuration, with random rewards.

    Raises:
        ConfigError: what `build_state`, `load_prompts` and `load_reward` refuse.
    """
    if config.model.pipeline == "tiny":
        return Case(build_state(config), draw_prompts(config), load_reward(config.reward))
    pipeline = random_pipeline(config.model, device, getattr(torch, config.model.dtype))
    pipeline.vae.to(dtype=getattr(torch, config.model.dtype_of_vae))
    return Case(build_state(config, pipeline), draw_prompts(config), _random_reward)


def shape_case(config: Config) -> Case:
    """The same on the meta device, where nothing is computed and operations can be counted.

    Raises:
        ConfigError: the pipeline's configuration cannot be read.
    """
    pipeline = random_pipeline(config.model, torch.device("meta"), torch.float32)
    policy = load_policy(config.model, keep_reference=config.train.kl_weight > 0.0, pipeline=pipeline)
    state = TrainingState(config, cast(Accelerator, None), policy, optimizer=None, average=cast(EMAModel, None))
    return Case(state, draw_prompts(config), _random_reward)


def draw_prompts(config: Config) -> list[Prompt]:
    """An iteration's prompts; for a pipeline of random weights those of the scenes world, whatever its own are.

    Raises:
        ConfigError: what `load_prompts` refuses.
    """
    rng, count = numpy_stream(config.run.seed, "prompts"), config.rollout.prompts
    if config.model.pipeline != "tiny":
        return sample_prompts(rng, count, held_out=False)
    draw_training, _ = load_prompts(config.prompts)
    return UnitExtractor(config.units).fill(draw_training(rng, count))


def _random_reward(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    return np.random.default_rng(len(images)).random(len(prompts))


@contextmanager
def attention_of(variant: str) -> Iterator[None]:
    """Within this context recorded attention is computed as in `variant`, whichever function of the trainer records.

    Models whose attention is the user's backend in diffusers give that up for the unfused ones.
    """
    if variant not in _UNFUSED:
        yield
        return
    fused, kind = recorder.joint_attention, cast(Any, recorder.AttentionRecorder)
    recorder.joint_attention, kind._attend = _UNFUSED[variant], _attend_without_own
    try:
        yield
    finally:
        recorder.joint_attention, kind._attend = fused, _attend


_attend = recorder.AttentionRecorder._attend


def _attend_without_own(
    self: recorder.AttentionRecorder,
    attend: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_image_tokens: int | None,
    text_first: bool,
    text_lengths: Tensor | None,
    key_mask: Tensor | None,
    own: Any,
) -> Tensor:
    if num_image_tokens is None:
        num_image_tokens = self._num_image_tokens
    if num_image_tokens is None and self._unit_weights is not None:
        num_image_tokens = query.shape[2] - self._unit_weights.shape[1]
    if key_mask is not None and num_image_tokens is not None:
        text_lengths = recorder._text_lengths(key_mask, num_image_tokens, text_first)
    return _attend(self, attend, query, key, value, num_image_tokens, text_first, text_lengths, None, None)


def roll_out(case: Case, arm: Arm, steps: int) -> Callable[[], Trajectory]:
    """The first batch of an iteration's rollout in `steps` denoising steps, all with noise."""
    config, policy = case.of(arm).config, case.state.policy
    rows = torch.arange(case.rollout_batch) // config.rollout.samples
    prompts = case.prompts[: int(rows[-1]) + 1]
    conditioning = policy.encode([prompt.text for prompt in prompts])[rows]
    # Once per batch, whatever the number of its steps.
    units = text_units(policy, prompts)[rows] if config.uses_maps else None

    def call() -> Trajectory:
        with attention_of(arm.variant):
            return denoise(
                policy,
                conditioning,
                steps=steps,
                kind=config.rollout.sampler,
                generator=stream(config.run.seed, "rollout"),
                eta=config.rollout.eta,
                guidance_scale=config.rollout.guidance_scale,
                units=units,
                allocation=config.allocation,
                keep_velocity=config.needs_old_velocity,
                backend=config.backend,
            )

    return call


def one_pass(case: Case) -> Case:
    """The case with no more samples than a backward pass takes, in one optimiser step."""
    config, (prompts, samples) = case.state.config, case.update_groups
    size = {"prompts": prompts, "samples": samples, "batch_size": prompts * samples}
    rollout = size | {"sde_steps": 1, "sde_window": None}
    train = {"updates": 1, "step_fraction": 1.0}
    sections = {"rollout": config.rollout.model_copy(update=rollout), "train": config.train.model_copy(update=train)}
    return replace(case.under(config.model_copy(update=sections)), prompts=case.prompts[:prompts])


def update_once(case: Case) -> Callable[[Arm], Callable[[], object]]:
    """One optimiser step on one backward pass of samples, at one denoising step, by arm."""
    small = one_pass(case)
    section = small.state.config.rollout
    trajectory = roll_out(small, Arm("star"), ROLLOUT_STEPS)()
    assert trajectory.log_prob is not None, "the steps have noise"
    # The first step alone is trained on.
    trained = replace(
        trajectory,
        log_prob=trajectory.log_prob[:1],
        coefficients=trajectory.coefficients[:1],
        velocity=None if trajectory.velocity is None else trajectory.velocity[:1],
    )
    _, timesteps = small.state.policy.schedule(ROLLOUT_STEPS)
    conditioning = small.state.policy.encode([prompt.text for prompt in small.prompts])
    places = np.arange(len(small.prompts) * section.samples)
    rewards = np.random.default_rng(0).random(len(places))
    rollout = Rollout(trained, timesteps, conditioning, rewards, small.prompts, places, section.samples, seconds={})
    advantages = group_advantages(rewards, section.samples)

    def of(arm: Arm) -> Callable[[], object]:
        call = functools.partial(update, small.of(arm), rollout, advantages, 0)
        return lambda: _within(arm, call)

    return of


class _InTurn(Executor):
    """Rewards are computed between the batches and not beside them: what a device does is then counted in one place."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **options))
        return future


def iterate(case: Case, arm: Arm) -> Callable[[], object]:
    """An iteration as training runs it: sampling, rewards, advantages, update."""
    state = case.of(arm)
    section = state.config.train

    def iteration() -> object:
        rollout = collect(state.policy, state.config, case.prompts, case.reward, _InTurn(), 0)
        advantages = group_advantages(
            rollout.rewards, rollout.group_size, std=section.advantage_std, clip=section.advantage_clip
        )
        return update(state, rollout, advantages, 0)

    return lambda: _within(arm, iteration)


def _within(arm: Arm, call: Callable[[], object]) -> object:
    with attention_of(arm.variant):
        return call()


@dataclass(frozen=True)
class LayerInputs:
    """What one attention of the rollout sees: query, key and value [B, heads, N, D], image tokens first; in a U-Net
    the queries are the image's alone, and keys and values the text's."""

    query: Tensor
    key: Tensor
    value: Tensor
    unit_weights: Tensor
    num_image_tokens: int
    rows: tuple[int, int]


def layer_inputs(case: Case) -> LayerInputs:
    """Normal queries, keys and values in the dtype of the model, and the units of the prompts."""
    state, batch = case.state, case.rollout_batch
    policy = state.policy
    heads, head_dim = policy.family.attention_heads(policy.model.config)
    rows = torch.arange(batch) // state.config.rollout.samples
    units = text_units(policy, case.prompts[: int(rows[-1]) + 1])[rows]
    image = policy.grid[0] * policy.grid[1]
    total = batch * (2 if policy.takes_two_predictions(state.config.rollout.guidance_scale) else 1)
    text, dtype = units.weights.shape[1], getattr(torch, state.config.model.dtype)
    lengths = (image, text, text) if policy.family.model_part == "unet" else (image + text,) * 3
    query, key, value = (
        torch.randn(total, heads, length, head_dim, device=policy.device, dtype=dtype) for length in lengths
    )
    return LayerInputs(query, key, value, units.weights, image, (total - batch, total))


def attend(inputs: LayerInputs, arm: Arm, backend: str) -> Callable[[], object]:
    """One joint attention, with capture where the method makes maps."""
    qkv = (inputs.query, inputs.key, inputs.value)
    if arm.method == "uniform":
        return functools.partial(torch.nn.functional.scaled_dot_product_attention, *qkv)
    options: dict[str, Any] = {"num_image_tokens": inputs.num_image_tokens, "rows": inputs.rows}
    if arm.variant == "fused":
        return functools.partial(sk.joint_attention, *qkv, inputs.unit_weights, **options, backend=backend)
    return functools.partial(_UNFUSED[arm.variant], *qkv, inputs.unit_weights, **options)


def make_map(case: Case, inputs: LayerInputs, arm: Arm) -> tuple[Callable[[], Tensor], int]:
    """A step's allocation map, and the bytes of mass and map."""
    config, grid = case.of(arm).config, case.state.policy.grid
    mass = torch.rand(len(inputs.unit_weights), inputs.num_image_tokens, inputs.unit_weights.shape[2])
    mass, allocation = mass.to(inputs.query.device), config.allocation
    call = functools.partial(
        sk.allocation_map,
        mass,
        grid,
        backend=config.backend,
        **allocation.options(0),
    )
    return call, mass.nbytes + 4 * len(mass) * grid[0] * grid[1]


def lose(case: Case, arm: Arm) -> tuple[Callable[[], Tensor], int]:
    """The policy loss of one backward pass and its gradient for the velocity; the bytes of inputs and gradient."""
    state = case.of(arm)
    config, policy, device = state.config, state.policy, state.policy.device
    prompts, samples = case.update_groups
    batch, (channels, height, width) = prompts * samples, policy.latent_shape
    generator = torch.Generator().manual_seed(0)
    velocity, sample, noise = (torch.randn(batch, channels, height, width, generator=generator) for _ in range(3))
    velocity = velocity.to(device, getattr(torch, config.model.dtype))
    sample, noise = sample.to(device), noise.to(device)
    row = sk.transition_coefficients("flow_sde", torch.tensor([0.8]), torch.tensor([0.7])).to(device)
    drawn = sk.transition_step(velocity, sample, row, noise=noise)
    assert drawn.log_prob is not None, "it has noise"
    weights = torch.ones(batch, *policy.grid, device=device) if config.uses_maps else None
    advantage = torch.randn(batch, generator=generator).to(device)
    inputs = (sample, drawn.next_sample, drawn.log_prob, advantage)
    old_velocity = velocity.float() if config.needs_old_velocity else None

    def call() -> Tensor:
        moved = velocity.detach().requires_grad_()
        sk.policy_loss(
            moved,
            *inputs,
            row,
            weights=weights,
            objective=config.train.objective,
            old_velocity=old_velocity,
            clip_range=config.train.clip_range,
            divergence_limit=config.train.divergence_limit,
            granularity=config.train.granularity,
            backend=config.backend,
        ).loss.backward()
        assert moved.grad is not None
        return moved.grad

    moving = [velocity, velocity, *inputs, weights, old_velocity]
    return call, sum(tensor.nbytes for tensor in moving if tensor is not None)
