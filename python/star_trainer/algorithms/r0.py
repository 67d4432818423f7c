"""R0: differentiable rewards, back-propagated through a generator of few steps (docs/method.md, section 8).

What memory the gradient needs does not grow with the number of steps: the steps are sampled without a graph, rewards
give the gradient at the images that are supervised, and each step is then run again, the last one first, to turn the
gradient at its result into that at its input and at the weights. Decoder and rewards see a few images at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

import star_kernels as sk
from star_trainer.algorithms.policy_gradient import skip_update
from star_trainer.config import Config, Reward
from star_trainer.families.conditioning import Conditioning
from star_trainer.families.policy import Policy, load_small_decoder
from star_trainer.prompts import Prompt
from star_trainer.rewards import DifferentiableReward, RewardError, counted, open_gates
from star_trainer.run.log import Iteration
from star_trainer.run.processes import fail_together, gather, gather_array, without_synchronisation
from star_trainer.run.randomness import numpy_stream, stream
from star_trainer.run.state import TrainingState
from star_trainer.sampling import NonFiniteError, map_of_step, text_units

# Between these noise levels the first model guides: at the ends it sees noise alone, or nothing that it could add.
_GUIDANCE_LEVELS = (0.1, 0.9)
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Supervision:
    """What looks at the generator's images: rewards by name, their weights, and the decoder that they look through."""

    rewards: Mapping[str, DifferentiableReward]
    weights: Mapping[str, float]
    decoder: Any = None


def load_supervision(config: Config, rewards: Mapping[str, DifferentiableReward], policy: Policy) -> Supervision:
    """The rewards with the decoder that the configuration asks for.

    Raises:
        ConfigError: a small decoder that cannot be loaded, or that is for other latents.
    """
    if config.r0.checkpointing and policy.pipeline.vae._supports_gradient_checkpointing:
        policy.pipeline.vae.enable_gradient_checkpointing()
    decoder = None
    if config.r0.small_decoder is not None:
        decoder = load_small_decoder(config.r0.small_decoder, policy)
        if config.r0.checkpointing:
            decoder.enable_gradient_checkpointing()
    return Supervision(rewards, config.reward.terms, decoder)


def reward_gradient_iteration(
    state: TrainingState,
    supervision: Supervision,
    prompts: Sequence[Prompt],
    iteration: int,
) -> Iteration:
    """`train.updates` optimiser steps, each on its share of the iteration's samples, drawn by the weights of then.

    What is drawn for a sample and which update takes it depends on its place among those of all processes alone.

    Args:
        state: what is trained.
        supervision: from `load_supervision`.
        prompts: the iteration's, whose samples are divided among all processes.
        iteration: its number.

    Raises:
        RewardError: a reward that gives anything but finite numbers with a gradient.
        NonFiniteError: images with NaN or infinity, or too many updates in a row with them.
    """
    config, accelerator = state.config, state.accelerator
    samples, size = config.rollout.samples, config.train.batch_size
    start = time.perf_counter()
    rewards = np.zeros(len(prompts) * samples)
    seconds = dict.fromkeys(("rollout", "reward"), 0.0)
    weight = regularizer_weight(config, iteration)
    totals: list[dict[str, float]] = []
    updates = 0

    def one_pass(places: np.ndarray, scale: float) -> _Pass:
        own = [prompts[place // samples] for place in places]
        done = backward(state, supervision, own, places.tolist(), iteration, scale)
        rewards[places] = done.rewards
        for name, value in done.seconds.items():
            seconds[name] += value
        return done

    def run_all(own: np.ndarray, scale: float) -> list[_Pass]:
        batches = np.array_split(own, math.ceil(len(own) / size)) if len(own) else []
        return [one_pass(places, scale) for places in batches]

    state.policy.transformer.train()
    for part in parts(config, iteration):
        state.optimizer.zero_grad()
        own = own_share(part, accelerator)
        with without_synchronisation(accelerator, state.policy.transformer, active=True):
            run = partial(run_all, own, 1.0 / len(part))
            passes = fail_together(accelerator, run, RewardError, NonFiniteError)
        summary = _means(state, list(supervision.rewards), passes, len(part)) | _regularized(state, weight)
        updates += 1
        broken = [f"{name} is {value}" for name, value in summary.items() if not math.isfinite(value)]
        if broken:
            skip_update(state, ", ".join(broken), f"samples {own.tolist()[:8]}")
            continue
        state.optimizer.step()
        state.average.step(list(state.policy.trainable().values()))
        state.skipped_in_a_row = 0
        totals.append(summary)
    state.policy.transformer.eval()
    counts = {"updates": float(len(totals)), "skipped_updates": float(updates - len(totals))}
    metrics = counts | {"regularizer_weight": weight}
    if totals:
        metrics |= {name: float(np.mean([entry[name] for entry in totals])) for name in totals[0]}
    _wait_for(state.policy.device)
    seconds["update"] = time.perf_counter() - start - sum(seconds.values())
    seconds["reward_wait"], seconds["reward_hidden"] = seconds["reward"], 0.0
    # Each sample is of one process, and 0 in the others.
    return Iteration(gather_array(accelerator, rewards[None]).sum(0), seconds, metrics)


def parts(config: Config, iteration: int) -> list[np.ndarray]:
    """The places of the samples that each update takes, drawn over those of all processes."""
    total = config.rollout.prompts * config.rollout.samples
    order = numpy_stream(config.run.seed, "update", iteration).permutation(total)
    return np.array_split(order, config.train.updates)


def own_share(part: np.ndarray, accelerator: Accelerator) -> np.ndarray:
    """What this process draws of an update's samples; the shares of all differ by one sample at most."""
    return part[accelerator.process_index :: accelerator.num_processes]


def _wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given, so that its time is counted where it belongs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _regularized(state: TrainingState, weight: float) -> dict[str, float]:
    """Make the gradient that of all processes' samples and of the regulariser, clip it, and say what was found."""
    config = state.config
    parameters = list(state.policy.trainable().values())
    _sum_over_processes(state, parameters)
    with torch.set_grad_enabled(weight > 0.0):
        distance, penalty = regularization(state.policy, config.r0.regularizer)
    if weight > 0.0:
        (weight * penalty).backward()
    norm = state.accelerator.clip_grad_norm_(parameters, config.train.max_gradient_norm)
    return {"gradient_norm": float(norm), "distance": float(distance), "penalty": float(penalty.detach())}


def regularizer_weight(config: Config, iteration: int) -> float:
    """The weight at an iteration (from 0), on its way from the first to the last."""
    first, last = config.r0.regularizer_weight, config.r0.regularizer_final
    if last is None or config.train.iterations == 1:
        return first
    share = min(1.0, iteration / (config.train.iterations - 1))
    if config.r0.regularizer_schedule == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return first + share * (last - first)


def regularization(policy: Policy, kind: str) -> tuple[Tensor, Tensor]:
    """The distance from the first weights relative to their norm, and the penalty that `r0.regularizer` names.

    With adapters, the distance is that of the layers which have one: ‖s·B·A‖ over ‖W‖, both over all such layers.
    """
    layers = list(_adapted_layers(policy.model))
    if not layers:
        pairs = list(zip(policy.model.parameters(), policy.frozen_copy.parameters(), strict=True))
        squared = torch.stack([(now - first).float().square().sum() for now, first in pairs]).sum()
        first_norm = torch.stack([first.detach().float().square().sum() for _, first in pairs]).sum()
        return (squared / first_norm).detach().sqrt(), squared / first_norm
    moved, norms, sizes = [], [], []
    for base, down, up, scale in layers:
        # ‖B·A‖² = tr(BᵀB·AAᵀ), without the product of the size of the layer.
        moved.append(scale**2 * ((up.T @ up) * (down @ down.T)).sum())
        norms.append(base.detach().float().square().sum())
        sizes.append(0.5 * (down.square().sum() + up.square().sum()))
    squared = torch.stack(moved).sum() / torch.stack(norms).sum()
    penalty = squared if kind == "distance" else torch.stack(sizes).sum()
    # Rounding can leave a square below 0 where nothing has moved.
    return squared.detach().clamp(min=0.0).sqrt(), penalty


def _adapted_layers(model: Any) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Weights W, A, B and scale of every layer with an adapter."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            for name in module.lora_A:
                weights = module.base_layer.weight, module.lora_A[name].weight, module.lora_B[name].weight
                yield (*weights, float(module.scaling[name]))


@dataclass
class _Pass:
    """One backward pass: each reward by name and their weighted sum [b], and the seconds it took by part."""

    values: dict[str, np.ndarray]
    rewards: np.ndarray
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Generator:
    """The generator on a batch; its noise and how much of it each trajectory takes are fixed."""

    policy: Policy
    conditioning: Conditioning
    timesteps: Tensor
    coefficients: list[sk.TransitionCoefficients]
    # From each noise level straight to the image.
    to_image: list[sk.TransitionCoefficients]
    noise: list[Tensor | None]
    backend: str

    @property
    def steps(self) -> int:
        return len(self.coefficients)

    def advance(self, step: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The next latents and the clean ones that the model predicts, both [B, C, H, W]; the last step's are one."""
        velocity = self.policy.velocity(latents, self.timesteps[step], self.conditioning)
        clean = sk.transition_step(velocity, latents, self.to_image[step], noise=None, backend=self.backend).next_sample
        if step + 1 == self.steps:
            return clean, clean
        noise = self.noise[step]
        following = sk.transition_step(velocity, latents, self.coefficients[step], noise=noise, backend=self.backend)
        return following.next_sample, clean


@dataclass
class _Trajectory:
    """Latents before each step, the clean ones predicted there, and the allocation maps [B, h, w] of the steps."""

    latents: list[Tensor] = field(default_factory=list)
    clean: list[Tensor] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)


def backward(
    state: TrainingState,
    supervision: Supervision,
    prompts: Sequence[Prompt],
    places: Sequence[int],
    iteration: int,
    scale: float,
) -> _Pass:
    """Sample, reward, and add the gradient of −`scale` times the sum of the samples' rewards to the parameters.

    Args:
        state: what is trained; the gradient is added to that of its parameters.
        supervision: from `load_supervision`.
        prompts: one per sample.
        places: of the samples among those of the iteration: they decide what is drawn.
        iteration: its number, likewise.
        scale: one over the samples of an update, for the gradient of their mean.

    Raises:
        RewardError: a reward that gives anything but finite numbers with a gradient.
        NonFiniteError: images with NaN or infinity.
    """
    config, policy = state.config, state.policy
    generators = [stream(config.run.seed, "r0", iteration, place) for place in places]
    generator, latents = _prepare(config, policy, prompts, generators)
    first = generator.steps - (config.r0.gradient_steps or generator.steps)
    kept = not config.r0.checkpointing
    start = time.perf_counter()
    trajectory = _sample(config, generator, latents, prompts, first if kept else generator.steps)
    _wait_for(policy.device)
    sampled = time.perf_counter()

    last = generator.steps - 1
    weights = {last: 1.0}
    if config.method == "r0_plus" and config.r0.intermediate_weight > 0.0:
        weights |= dict.fromkeys(range(first, last), config.r0.intermediate_weight)
    gradients: dict[int, Tensor] = {}
    values: dict[str, np.ndarray] = {}
    for step, weight in weights.items():
        regions = trajectory.maps[step] if config.r0.allocate else None
        found, gradient = _reward_gradient(config, policy, supervision, trajectory.clean[step], prompts, regions)
        gradients[step] = weight * gradient
        if step == last:
            values = found
            if config.method == "r0_plus" and config.r0.guidance_weight > 0.0:
                gradients[step] += _guidance(config, policy, trajectory.clean[step], gradient, generator, generators)
    rewarded = time.perf_counter()

    if kept:
        outputs = [trajectory.clean[step] for step in gradients]
        torch.autograd.backward(outputs, [(-scale * gradients[step]).to(outputs[0].dtype) for step in gradients])
    else:
        _run_again(generator, trajectory, gradients, first, -scale)
    total = sum(supervision.weights[name] * found for name, found in counted(config.reward, values).items())
    return _Pass(values, np.asarray(total), {"rollout": sampled - start, "reward": rewarded - sampled})


def _prepare(
    config: Config, policy: Policy, prompts: Sequence[Prompt], generators: list[torch.Generator]
) -> tuple[_Generator, Tensor]:
    """The generator of a batch and the noise it starts from, all drawn on the CPU, by one stream per sample."""
    steps, device = config.rollout.steps, policy.device
    shape = (len(prompts), *policy.latent_shape)
    sigmas, timesteps = policy.schedule(steps)
    levels = sigmas.cpu()

    def draw() -> Tensor:
        return randn_tensor(shape, generator=generators, device=torch.device("cpu"))

    initial = draw()
    low, high = config.r0.eta
    shares = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    shares = low + (high - low) * shares
    noising = policy.family.noising
    coefficients, noise = [], []
    for step in range(steps):
        row = noising.renoised(levels[step], levels[step + 1], shares)
        coefficients.append(row.to(device))
        noise.append(draw().to(device) if row.stochastic else None)
    to_image = [noising.to_clean(level).to(device) for level in levels[:-1]]
    conditioning = policy.encode([prompt.text for prompt in prompts])
    generator = _Generator(policy, conditioning, timesteps, coefficients, to_image, noise, config.backend)
    return generator, initial.to(device)


def _sample(
    config: Config, generator: _Generator, latents: Tensor, prompts: Sequence[Prompt], first_with_graph: int
) -> _Trajectory:
    """Run all steps, those from `first_with_graph` on with a graph, and record attention where maps are wanted."""
    policy, allocation = generator.policy, config.allocation
    trajectory = _Trajectory()
    recording: Any = nullcontext()
    if config.r0.allocate:
        units = text_units(policy, prompts)
        recording = sk.record_attention(policy.transformer, units, backend=config.backend, **allocation.recorded)
    with recording as recorder:
        for step in range(generator.steps):
            trajectory.latents.append(latents)
            with torch.set_grad_enabled(step >= first_with_graph):
                latents, clean = generator.advance(step, latents)
            trajectory.clean.append(clean)
            if recorder is None:
                continue
            with torch.no_grad():
                trajectory.maps.append(map_of_step(policy, recorder, allocation, step, config.backend))
            recorder.discard_step()
    return trajectory


def _run_again(
    generator: _Generator, trajectory: _Trajectory, gradients: Mapping[int, Tensor], first: int, scale: float
) -> None:
    """Back-propagate step by step from the last to `first`; only one step's activations exist at a time."""
    incoming: Tensor | None = None
    for step in reversed(range(first, generator.steps)):
        latents = trajectory.latents[step].detach().requires_grad_(step > first)
        with torch.enable_grad():
            following, clean = generator.advance(step, latents)
        outputs, given = [], []
        if step in gradients:
            outputs.append(clean)
            given.append((scale * gradients[step]).to(clean.dtype))
        if incoming is not None:
            outputs.append(following)
            given.append(incoming)
        torch.autograd.backward(outputs, given)
        incoming = latents.grad


def _reward_gradient(
    config: Config,
    policy: Policy,
    supervision: Supervision,
    latents: Tensor,
    prompts: Sequence[Prompt],
    regions: Tensor | None,
) -> tuple[dict[str, np.ndarray], Tensor]:
    """Each reward [B] of the images of clean latents [B, C, H, W], and the gradient of their weighted sum by those.

    The gradient of each reward by an image is scaled to length 1 first, if it is to be; `regions` [B, h, w] then weight
    that of the sum.
    """
    values: dict[str, list[np.ndarray]] = {name: [] for name in supervision.rewards}
    parts = []
    for start in range(0, len(latents), config.r0.decode_batch_size):
        rows = slice(start, start + config.r0.decode_batch_size)
        leaf = latents[rows].detach().requires_grad_()
        with torch.enable_grad():
            images = policy.pixels(leaf, supervision.decoder)
        if not torch.isfinite(images).all():
            bad = [start + i for i, image in enumerate(images) if not torch.isfinite(image).all()]
            raise NonFiniteError(
                f"the images of samples {bad[:8]} of a batch have NaN or infinity: lower train.learning_rate or use a "
                "wider model.dtype"
            )
        pixels = images.detach().requires_grad_()
        texts = [prompt.text for prompt in prompts[rows]]
        total = torch.zeros_like(pixels)
        found = {name: _by_image(name, reward, pixels, texts) for name, reward in supervision.rewards.items()}
        counts = _where_it_counts(config.reward, {name: value for name, (value, _) in found.items()})
        for name, (value, gradient) in found.items():
            values[name].append(value)
            if config.r0.normalize_gradients:
                gradient = gradient / gradient.flatten(1).norm(dim=1).clamp(min=_SMALLEST_NORM).view(-1, 1, 1, 1)
            if name in counts:
                gradient = gradient * torch.from_numpy(counts[name]).to(gradient).view(-1, 1, 1, 1)
            total += supervision.weights[name] * gradient
        if regions is not None:
            total *= torch.nn.functional.interpolate(regions[rows, None].to(total.dtype), total.shape[-2:])
        parts.append(torch.autograd.grad(images, leaf, total.to(images.dtype))[0].float())
    return {name: np.concatenate(found) for name, found in values.items()}, torch.cat(parts)


def _where_it_counts(config: Reward, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By term that has a floor or a gate, which images' values make a difference: [B] bool."""
    above = {name: values[name] > floor for name, floor in config.floors.items()}
    gates = open_gates(config, values)
    return above | {name: is_open & above.get(name, True) for name, is_open in gates.items()}


def _by_image(
    name: str, reward: DifferentiableReward, pixels: Tensor, texts: Sequence[str]
) -> tuple[np.ndarray, Tensor]:
    """A reward's values [B], and their gradient by images [B, 3, H, W].

    Raises:
        RewardError: the reward fails, or gives anything but B finite numbers with a gradient.
    """
    gradient = None
    try:
        with torch.enable_grad():
            values = reward(pixels, texts)
        if isinstance(values, Tensor) and values.requires_grad:
            (gradient,) = torch.autograd.grad(values.sum(), pixels, allow_unused=True)
    except Exception as error:
        raise RewardError(f"reward {name}: {type(error).__name__}: {error}") from error
    if not isinstance(values, Tensor) or values.shape != (len(texts),):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(f"reward {name}: expected a tensor [{len(texts)}] from differentiable, got {got}")
    if gradient is None:
        raise RewardError(f"reward {name}: what differentiable returns does not depend on the images")
    if not (torch.isfinite(values).all() and torch.isfinite(gradient).all()):
        raise RewardError(f"reward {name}: got NaN or infinity, in its value or its gradient")
    return values.detach().double().cpu().numpy(), gradient.float()


def _guidance(
    config: Config,
    policy: Policy,
    clean: Tensor,
    reward_gradient: Tensor,
    generator: _Generator,
    generators: list[torch.Generator],
) -> Tensor:
    """Where the first model, as an implicit classifier of prompt against no prompt, would move clean latents.

    At a random noise level t the difference of its two predictions of the clean latents, −t·(v_c − v_u) of velocities,
    points along the gradient of log p(prompt | latents). It acts on the latents themselves, at full resolution, while
    rewards see what their models make of an image.
    """
    batch, device, noising = len(clean), clean.device, policy.family.noising
    low, high = _GUIDANCE_LEVELS
    sigma = torch.cat([low + (high - low) * torch.rand(1, generator=each) for each in generators]).to(device)
    level = noising.level_of(sigma)
    noise = randn_tensor(clean.shape, generator=generators, device=torch.device("cpu")).to(device)
    noisy = noising.mixed(clean.detach(), noise, level)
    timesteps = policy.family.timesteps_at(policy.pipeline, level)
    conditional = policy.reference_velocity(noisy, timesteps, generator.conditioning)
    unconditional = policy.reference_velocity(noisy, timesteps, policy.encode([""]).repeat(batch))
    direction = noising.to_clean(level).velocity_scale.view(-1, 1, 1, 1) * (conditional - unconditional).float()
    if config.r0.normalize_gradients:
        length = direction.flatten(1).norm(dim=1).clamp(min=_SMALLEST_NORM)
        direction = direction * (reward_gradient.flatten(1).norm(dim=1) / length).view(-1, 1, 1, 1)
    return config.r0.guidance_weight * direction


def _sum_over_processes(state: TrainingState, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Add the gradients of all processes."""
    if state.accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = state.accelerator.reduce(parameter.grad, "sum")


def _means(state: TrainingState, names: Sequence[str], passes: Sequence[_Pass], size: int) -> dict[str, float]:
    """Over the samples of all processes, the rewards' means and how many pass each gate."""
    gates = [open_gates(state.config.reward, done.values) for done in passes]
    given = {f"reward_{name}": [done.values[name] for done in passes] for name in names}
    given |= {f"gate_{name}": [found[name] for found in gates] for name in state.config.reward.gates}
    own = torch.tensor([[sum(float(part.sum()) for part in parts) for parts in given.values()]], dtype=torch.float64)
    sums = gather(state.accelerator, own).sum(0) / size
    return {name: float(value) for name, value in zip(given, sums, strict=True)}


def stop_reason(config: Config, metrics: Mapping[str, float], scores: tuple[float, float] | None) -> str | None:
    """Why the run should end now, or None: weights too far from the first ones, or a held-out score that has fallen.

    `scores` are that score of the first weights and now, if it was measured.
    """
    far, drop = config.r0.stop_distance, config.r0.stop_drop
    if far is not None and metrics.get("distance", 0.0) > far:
        return f"the weights are {metrics['distance']:.3g} away from the first ones, beyond r0.stop_distance={far:g}"
    if drop is not None and scores is not None and scores[1] < scores[0] - drop:
        return f"the held-out score fell from {scores[0]:.4f} to {scores[1]:.4f}, by more than r0.stop_drop={drop:g}"
    return None
