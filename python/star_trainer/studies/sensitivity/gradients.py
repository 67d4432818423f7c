"""Signal and noise of the policy gradient under each allocation of the same rollouts.

At a fixed policy, n independent batches give n on-policy gradients g_1 … g_n of the trained parameters. With their
Gram matrix, ‖E g‖² is estimated without bias by the mean of g_i·g_j over i ≠ j, and the trace of the covariance by the
mean of ‖g_i‖² less that. The ratio of the two says how much of a batch's gradient is signal: 1 / ratio is the number of
batches after which the error of their mean is as long as the mean itself.

Other settings of STAR's allocation are compared on the same rollouts: their maps are recorded by running the model
again on the rollout's latents.

On policy all ratios are 1, where the image-level objective has the gradient of the position-level one with even
weights: one arm, `uniform`, stands for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

import star_kernels as sk
from star_trainer.algorithms.advantages import advantages_of, control_weights
from star_trainer.algorithms.policy_gradient import attention_of_the_rollout, batch_of, log_prob, predict, take
from star_trainer.algorithms.rollout import Rollout, collect
from star_trainer.config import Allocation
from star_trainer.families.devices import own_worker
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardFunction
from star_trainer.run.inputs import PromptSource
from star_trainer.run.processes import full_tensor
from star_trainer.run.randomness import numpy_stream
from star_trainer.run.state import TrainingState
from star_trainer.sampling import map_of_step, text_units, with_last
from star_trainer.worlds.scenes.oracle import true_maps

# Iterations of the rollouts' random numbers that no training reaches, so that no batch was trained on.
_FIRST_ITERATION = 1_000_000
# With fewer batches there is no jackknife interval.
_FEWEST = 3
# What takes a step's place where all are added up.
SUM = "all"


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % jackknife interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Signal:
    """What n gradients say: ‖E g‖² (may come out below 0), tr Cov g, their ratio, two batches' mean cosine.

    The ratio is compared with that of the arms uniform and star on the same batches, where these were measured.
    Only even weights have the gradient of the expected reward itself: `cosine_to_uniform` is the cosine of the expected
    gradients, and `ratio_along_uniform` counts as signal only the part of the expected gradient along uniform's. The
    cosine is made of unbiased estimates and may come out beyond 1. Where an estimate of ‖E g‖² that they divide by is
    not positive, with all batches or with any one left out, they are not defined, and None.
    """

    arm: str
    step: str
    batches: int
    squared_mean: float
    covariance_trace: float
    ratio: Estimate
    cosine: Estimate
    ratio_less_uniform: Estimate | None = None
    ratio_less_star: Estimate | None = None
    cosine_to_uniform: Estimate | None = None
    ratio_along_uniform: Estimate | None = None


def pair_means(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means off and on the diagonal of [n, n], n >= 3: [1 + n] each, of all batches and then with each one left out."""
    n, diagonal = len(products), np.diagonal(products)
    sums = products.sum() - np.r_[0.0, products.sum(0) + products.sum(1) - diagonal]
    on = diagonal.sum() - np.r_[0.0, diagonal]
    counts = np.r_[n, np.full(n, n - 1)]
    return (sums - on) / (counts * (counts - 1)), on / counts


@dataclass(frozen=True)
class Moments:
    """‖E g‖², tr Cov g (both unbiased) and the mean cosine between batches: [1 + n] each, as of `pair_means`."""

    signal: np.ndarray
    noise: np.ndarray
    cosine: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """‖E g‖² / tr Cov g; NaN without noise."""
        return np.divide(self.signal, self.noise, out=np.full_like(self.signal, np.nan), where=self.noise > 0)


def moments(gram: np.ndarray) -> Moments:
    """The moments of n >= 3 gradients from their Gram matrix [n, n]."""
    between, within = pair_means(gram)
    norms = np.sqrt(np.diagonal(gram))
    lengths = np.outer(norms, norms)
    cosines = np.divide(gram, lengths, out=np.zeros_like(gram), where=lengths > 0)
    return Moments(between, within - between, pair_means(cosines)[0])


def jackknife(values: np.ndarray) -> Estimate:
    """A statistic [1 + n], as of `pair_means`, with the interval that leaving out one of n >= 3 batches gives."""
    left_out = values[1:]
    n = len(left_out)
    error = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Estimate(float(values[0]), float(values[0]) - half, float(values[0]) + half)


def summarise(step: str, gradients: Mapping[str, Tensor]) -> list[Signal]:
    """The statistics of each arm's gradients [n, P] at one step, and how they compare on the same batches.

    Raises:
        ValueError: fewer than three batches, of which an interval cannot be made.
    """
    count = len(next(iter(gradients.values())))
    if count < _FEWEST:
        raise ValueError(f"gradients: expected at least {_FEWEST} batches, got {count}")
    exact = {arm: own.double() for arm, own in gradients.items()}
    found = {arm: moments(inner_products(own, own)) for arm, own in exact.items()}
    even = found.get("uniform")
    signals = []
    for arm, own in found.items():
        differences = {
            name: jackknife(own.ratio - found[name].ratio)
            for name in ("uniform", "star")
            if name in found and name != arm
        }
        cosine = along = None
        if even is not None and arm != "uniform" and (even.signal > 0).all():
            shared, _ = pair_means(inner_products(exact[arm], exact["uniform"]))
            along = jackknife(shared**2 / even.signal / own.noise) if (own.noise > 0).all() else None
            cosine = jackknife(shared / np.sqrt(own.signal * even.signal)) if (own.signal > 0).all() else None
        signals.append(
            Signal(
                arm,
                step,
                count,
                squared_mean=float(own.signal[0]),
                covariance_trace=float(own.noise[0]),
                ratio=jackknife(own.ratio),
                cosine=jackknife(own.cosine),
                ratio_less_uniform=differences.get("uniform"),
                ratio_less_star=differences.get("star"),
                cosine_to_uniform=cosine,
                ratio_along_uniform=along,
            )
        )
    return signals


def inner_products(first: Tensor, second: Tensor) -> np.ndarray:
    """Inner products [n, n] of n gradients [n, P] with n others."""
    return (first @ second.T).numpy()


@dataclass(frozen=True)
class Steps:
    """How one arm's denoising steps go together: their weights by kind, and the cosines of their expected gradients.

    The weights have mean 1. Those of ``best`` are |E g|/tr Cov g, which give the sum of the steps the most signal for
    its noise where expected gradients are aligned and noises independent; they are made from the batches that they are
    then applied to. `cosines` [S, S] are None where an estimate of ‖E g‖² is not positive.
    """

    arm: str
    steps: list[int]
    weights: dict[str, list[float]]
    cosines: list[list[Estimate | None]]


@dataclass(frozen=True)
class Measurement:
    """What was measured, whether it was ended early, and the fault that did, if it was no interrupt.

    `means` are the mean gradients [P] by arm and kind of temporal weights.
    """

    signals: list[Signal]
    steps: list[Steps]
    failure: Exception | None
    means: dict[tuple[str, str], Tensor]
    is_whole: bool


def measure_gradients(
    state: TrainingState,
    draw: PromptSource,
    reward: RewardFunction,
    arms: Sequence[str],
    batches: int,
    fill: Callable[[Sequence[Prompt]], list[Prompt]],
    others: Mapping[str, Allocation] | None = None,
) -> Measurement:
    """Signal and noise per arm, for each denoising step and for their sums, from `batches` fresh rollouts.

    `others` are further arms by name: the prompts' own maps, with other settings than the configuration's.

    A KeyboardInterrupt or a fault after three batches or more ends the measurement: the result is that of the batches
    so far, with the fault.
    The gradients of all batches are held in memory: batches · arms · steps · parameters · 4 bytes.
    """
    measured: list[dict[tuple[str, int], Tensor]] = []
    failure: Exception | None = None
    coefficients: list[sk.TransitionCoefficients] = []
    with own_worker() as worker:
        try:
            for batch in tqdm(range(batches), unit="batch", desc="gradients", disable=None):
                place = _FIRST_ITERATION + batch
                found, coefficients = _measure_batch(state, draw, reward, arms, fill, others or {}, worker, place)
                measured.append(found)
        except (KeyboardInterrupt, Exception) as error:
            if len(measured) < _FEWEST:
                raise
            tqdm.write(f"stopped after {len(measured)} of {batches} batches")
            failure = error if isinstance(error, Exception) else None
    by_arm: dict[str, dict[int, Tensor]] = {}
    for arm, step in measured[0]:
        by_arm.setdefault(arm, {})[step] = torch.stack([batch[arm, step] for batch in measured])
    trained = sorted(next(iter(by_arm.values())))
    rows = [coefficients[step] for step in trained]
    kinds = {kind: sk.temporal_weights(rows, kind=kind).tolist() for kind in ("none", "std", "velocity")}
    steps = [relate_steps(arm, own, kinds) for arm, own in by_arm.items()]
    added = sums_of(by_arm, steps)
    signals = [signal for kind, sums in added.items() for signal in summarise(kind, sums)]
    for step in trained:
        signals += summarise(str(step), {arm: own[step] for arm, own in by_arm.items()})
    means = {(arm, kind): own.mean(0) for kind, sums in added.items() for arm, own in sums.items()}
    return Measurement(signals, steps, failure, means, len(measured) == batches)


def relate_steps(arm: str, gradients: Mapping[int, Tensor], kinds: Mapping[str, list[float]]) -> Steps:
    """How the steps of one arm go together, from their gradients [n, P] and the weights of each kind."""
    exact = {step: own.double() for step, own in gradients.items()}
    found = {step: moments(inner_products(own, own)) for step, own in exact.items()}
    best = np.array([math.sqrt(max(own.signal[0], 0.0)) / own.noise[0] for own in found.values()])
    weights = {**kinds, "best": (best / best.mean()).tolist()} if best.any() else dict(kinds)

    def cosine(one: int, other: int) -> Estimate | None:
        lengths = found[one].signal * found[other].signal
        if not ((found[one].signal > 0).all() and (found[other].signal > 0).all()):
            return None
        shared, _ = pair_means(inner_products(exact[one], exact[other]))
        return jackknife(shared / np.sqrt(lengths))

    return Steps(arm, list(exact), weights, [[cosine(one, other) for other in exact] for one in exact])


def sums_of(by_arm: Mapping[str, Mapping[int, Tensor]], steps: Sequence[Steps]) -> dict[str, dict[str, Tensor]]:
    """Each arm's gradients [n, P] added up over the steps, by kind of weights: ``all``, ``all, std`` and so on."""
    sums: dict[str, dict[str, Tensor]] = {}
    for own in steps:
        for kind, weights in own.weights.items():
            parts = [weight * by_arm[own.arm][step] for step, weight in zip(own.steps, weights, strict=True)]
            sums.setdefault(SUM if kind == "none" else f"{SUM}, {kind}", {})[own.arm] = torch.stack(parts).sum(0)
    return sums


def _measure_batch(
    state: TrainingState,
    draw: PromptSource,
    reward: RewardFunction,
    arms: Sequence[str],
    fill: Callable[[Sequence[Prompt]], list[Prompt]],
    others: Mapping[str, Allocation],
    worker: Executor,
    iteration: int,
) -> tuple[dict[tuple[str, int], Tensor], list[sk.TransitionCoefficients]]:
    """The gradient [P] of every arm at every step with noise, from one rollout, and that one's coefficients."""
    config = state.config
    prompts = fill(draw(numpy_stream(config.run.seed, "prompts", iteration), config.rollout.prompts))
    rollout = collect(state.policy, config, prompts, reward, worker, iteration)
    advantages = advantages_of(config, rollout.rewards)
    weights = arm_weights(state, rollout, arms, numpy_stream(config.run.seed, "shuffle", iteration))
    if others:
        weights |= other_weights(state, rollout, others)
    return batch_gradients(state, rollout, advantages.values, weights), rollout.trajectory.coefficients


def arm_weights(
    state: TrainingState, rollout: Rollout, arms: Sequence[str], rng: np.random.Generator
) -> dict[str, Tensor | None]:
    """The maps [T, B, h, w] that each arm has for one rollout of STAR; None is even weights."""
    maps: dict[str, Tensor | None] = {}
    for arm in arms:
        if arm == "oracle":
            images = state.policy.decode(rollout.trajectory.latents[-1])
            steps = len(rollout.timesteps)
            true = true_maps(images, rollout.prompts, state.policy.grid, state.config.allocation, steps)
            maps[arm] = true.to(state.policy.device)
        else:
            maps[arm] = control_weights(arm, rollout.trajectory.weights, rollout.group_size, rng)
    return maps


@torch.no_grad()
def other_weights(state: TrainingState, rollout: Rollout, allocations: Mapping[str, Allocation]) -> dict[str, Tensor]:
    """The maps [S, B, h, w] of a rollout with other allocation settings, up to the last step S with noise.

    Up to the last of all where a map asks for that one's. The model runs again on the rollout's latents, once for each
    choice of layers and implementation.
    """
    config, policy, trajectory = state.config, state.policy, rollout.trajectory
    samples, size = len(rollout.rewards), rollout.group_size
    steps = 1 + max(step for step, row in enumerate(trajectory.coefficients) if row.stochastic)
    if any(allocation.map == "geometric" for allocation in allocations.values()):
        steps = len(trajectory.coefficients)
    maps = {name: torch.empty(steps, samples, *policy.grid, device=policy.device) for name in allocations}
    units = text_units(policy, rollout.prompts[::size])
    by_recording: dict[str, dict[str, Allocation]] = {}
    for name, allocation in allocations.items():
        by_recording.setdefault(str(allocation.recorded), {})[name] = allocation
    for own in by_recording.values():
        recorded = next(iter(own.values())).recorded
        for rows in torch.arange(samples).split(config.rollout.batch_size):
            with sk.record_attention(
                policy.transformer, units[rows // size], backend=config.backend, **recorded
            ) as recorder:
                for step in range(steps):
                    latents = trajectory.latents[step, rows].to(policy.device)
                    policy.velocity(latents, rollout.timesteps[step], rollout.conditioning_of(rows))
                    for name, allocation in own.items():
                        maps[name][step, rows] = map_of_step(policy, recorder, allocation, step, config.backend)
                    recorder.discard_step()
    return {name: with_last(own) if allocations[name].map == "geometric" else own for name, own in maps.items()}


def batch_gradients(
    state: TrainingState, rollout: Rollout, advantages: np.ndarray, weights: dict[str, Tensor | None]
) -> dict[tuple[str, int], Tensor]:
    """The on-policy gradient [P] of every arm at every step with noise; all arms share the forward passes.

    Samples of groups without spread have no advantage and add nothing, but count: gradients are means over all samples.
    """
    config, device = state.config, state.policy.device
    steps = [step for step, row in enumerate(rollout.trajectory.coefficients) if row.stochastic]
    batch = batch_of(state, rollout, advantages, steps)
    parameters = list(state.policy.trainable().values())
    sizes = sum(parameter.numel() for parameter in parameters)
    gradients = {(arm, step): torch.zeros(sizes) for arm in weights for step in steps}
    samples = len(rollout.rewards)
    state.policy.transformer.train()
    for first in range(0, samples, config.train.batch_size):
        rows = np.arange(first, min(first + config.train.batch_size, samples))
        taken = take(state, batch, rows)
        for step in steps:
            with attention_of_the_rollout(state):
                prediction = predict(state, taken, step)
            # That of these very passes: all ratios are 1, and nothing is clipped.
            old = log_prob(state, taken, step, prediction)
            for index, (arm, maps) in enumerate(weights.items()):
                leaf = prediction.velocity.detach().requires_grad_()
                result = sk.policy_loss(
                    leaf,
                    taken.latents[step],
                    taken.latents[step + 1],
                    old,
                    taken.advantages,
                    taken.coefficients[step],
                    weights=None if maps is None else maps[step, rows].to(device),
                    unconditional_velocity=prediction.unconditional,
                    guidance_scale=prediction.scale,
                    backend=config.backend,
                )
                (upstream,) = torch.autograd.grad(result.loss, leaf)
                more = index + 1 < len(weights)
                found = torch.autograd.grad(prediction.velocity, parameters, upstream, retain_graph=more)
                flat = torch.cat([full_tensor(part).flatten().float().cpu() for part in found])
                gradients[arm, step] += flat * (len(rows) / samples)
    state.policy.transformer.eval()
    return gradients
