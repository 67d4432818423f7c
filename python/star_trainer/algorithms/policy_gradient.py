"""The policy update: the objective over one iteration's samples (docs/method.md, sections 1, 4, 5 and 7)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

import star_kernels as sk
from star_trainer.algorithms.advantages import Advantages, advantages_of, control_weights
from star_trainer.algorithms.rollout import Rollout, collect
from star_trainer.families.conditioning import Conditioning, Guidance, Prediction
from star_trainer.families.devices import send
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardError, WeightedSum, sum_of
from star_trainer.run.interruption import stop_if_asked
from star_trainer.run.log import Iteration
from star_trainer.run.processes import (
    fail_together,
    full_tensor,
    gather,
    gather_samples,
    own_places,
    stop_together,
    without_synchronisation,
)
from star_trainer.run.randomness import numpy_stream
from star_trainer.run.state import TrainingState
from star_trainer.sampling import NonFiniteError

_log = logging.getLogger(__name__)

# Of the clip range: what training passes may differ from the rollout before that is said.
_SMALL_DISAGREEMENT = 0.1


def policy_gradient_iteration(
    state: TrainingState,
    reward: WeightedSum,
    worker: Executor,
    prompts: list[Prompt],
    iteration: int,
) -> Iteration:
    """Sample, reward, compare within groups, and update.

    Args:
        state: what is trained.
        reward: of images and prompts.
        worker: computes it while the next batch is sampled.
        prompts: the iteration's, whose samples are divided among all processes.
        iteration: its number.

    Raises:
        RewardError: a reward that cannot be had, in this or another process.
        NonFiniteError: samples, or too many updates in a row, with NaN or infinity.
    """
    config, accelerator = state.config, state.accelerator
    total = len(prompts) * config.rollout.samples
    places = own_places(accelerator, total)
    sample = partial(collect, state.policy, config, prompts, reward.each, worker, iteration, places)
    rollout = fail_together(accelerator, sample, RewardError, NonFiniteError)
    each = gather_samples(accelerator, torch.from_numpy(rollout.rewards), total).numpy()
    advantages = advantages_of(config, each)
    start = time.perf_counter()
    metrics = update(state, rollout, advantages, iteration)
    rollout.seconds["update"] = time.perf_counter() - start
    attention = rollout.trajectory.attention
    return Iteration(sum_of(config.reward, each), rollout.seconds, metrics, advantages.dropped, attention)


def update(state: TrainingState, rollout: Rollout, advantages: Advantages, iteration: int) -> dict[str, float]:
    """`train.updates` optimiser steps, each on its share of the samples and on the same chosen denoising steps.

    `advantages` are those of all processes' samples, `rollout` has this process's. What is drawn and which samples an
    optimiser step takes does not depend on the number of processes.
    """
    config, accelerator = state.config, state.accelerator
    rng = numpy_stream(config.run.seed, "update", iteration)
    steps = choose_steps(
        rollout.trajectory.coefficients, config.train.step_fraction, numpy_stream(config.run.seed, "steps", iteration)
    )
    # A stream of its own: the order of the samples must not depend on the method.
    weights = method_weights(state, rollout, numpy_stream(config.run.seed, "shuffle", iteration))
    kept = rng.permutation(len(advantages.kept))
    kept = kept[advantages.kept[kept]]
    rollout = replace(rollout, trajectory=replace(rollout.trajectory, weights=weights))
    trained = [part for part in np.array_split(kept, config.train.updates) if len(part) > 0]
    shares = [divide_samples(part, accelerator.num_processes) for part in trained]
    rollout = exchange(accelerator, rollout, shares)
    parts = [own_part(share, rollout, accelerator.process_index, config.train.batch_size) for share in shares]
    batch = batch_of(state, rollout, advantages.values.take(rollout.places, mode="clip"), steps)
    consistency: list[Tensor] = []
    if config.train.old_log_prob == "recompute":
        batch, consistency = recompute(state, batch, steps, parts)
    totals: list[dict[str, float]] = []
    skipped = 0
    for part in parts:
        stop_together(accelerator)
        state.policy.transformer.train()
        state.optimizer.zero_grad()
        passes: list[Pass] = []
        on_policy = config.train.old_log_prob == "rollout" and part is parts[0]
        last = len(part.chunks) - 1, steps[-1]
        for chunk, rows, samples, step in passes_of(state, batch, part, steps):
            if accelerator.num_processes == 1:
                stop_if_asked()
            with without_synchronisation(accelerator, state.policy.transformer, active=(chunk, step) != last):
                result, prediction = step_loss(state, samples, step)
                share = len(rows) * accelerator.num_processes / part.size / len(steps)
                accelerator.backward(result.loss * share)
            if len(rows) == 0:
                continue
            measured = {**result.metrics, "loss": result.loss.detach()}
            if on_policy or "divergence" not in measured:
                old = samples.old_log_prob[step - samples.first_noisy]
                difference = log_prob(state, samples, step, prediction) - old
                if on_policy:
                    consistency.append(log_ratio(state, difference))
                measured.setdefault("divergence", divergence(difference, prediction.velocity.shape[1]))
            if config.train.kl_weight == 0.0:
                # Without a weight the reference model is not run, and a KL of 0 would be no measurement.
                del measured["kl"]
            passes.append(Pass(step, rollout.places[rows], measured))
        state.policy.transformer.eval()
        parameters = list(state.policy.trainable().values())
        norm = full_tensor(accelerator.clip_grad_norm_(parameters, config.train.max_gradient_norm))
        summary = summarise(accelerator, passes, steps, norm, with_kl=config.train.kl_weight > 0.0)
        if summary["non_finite"] or not math.isfinite(summary["loss"] + summary["gradient_norm"]):
            skipped += 1
            bad = [p for p in passes if p.metrics["non_finite"] > 0 or not torch.isfinite(p.metrics["loss"])]
            where = [f"step {entry.step}, samples {entry.places.tolist()[:8]}" for entry in bad[:3]]
            what = (
                f"loss {summary['loss']}, gradient norm {summary['gradient_norm']}, "
                f"{summary['non_finite']:.0f} non-finite positions"
            )
            skip_update(state, what, "; ".join(where))
        else:
            state.optimizer.step()
            state.average.step(parameters)
            state.skipped_in_a_row = 0
            totals.append(summary)
    counts = {"updates": float(len(totals)), "skipped_updates": float(skipped)}
    agreement = rollout_agreement(accelerator, consistency)
    warn_of_disagreement(state, agreement, min(plan.clip_range for plan in batch.plans.values()))
    counts |= agreement
    if config.allocation.temporal != "none":
        counts |= {f"temporal_weight/step_{step + 1}": plan.weight for step, plan in batch.plans.items()}
    if not totals:
        return counts
    return counts | {name: float(np.mean([t[name] for t in totals])) for name in totals[0]}


@dataclass(frozen=True)
class StepPlan:
    """How much a denoising step counts, and the range in which its ratios may move."""

    weight: float
    clip_range: float


@dataclass(frozen=True)
class Batch:
    """What updates are made of: this process's samples, their advantages [B] and old log-probs [S, B, H, W].

    The first of the S is that of `rollout.trajectory.first_noisy`, as of the old velocities [S, B, C, H, W], guidance
    applied, where the objective asks for them; `plans` are those of the steps that are trained on.
    """

    rollout: Rollout
    advantages: np.ndarray
    old_log_prob: Tensor
    old_velocity: Tensor | None
    plans: dict[int, StepPlan]


def batch_of(state: TrainingState, rollout: Rollout, advantages: np.ndarray, steps: list[int]) -> Batch:
    """A rollout whose own log-probs and velocities are the old ones, to be trained on at some denoising steps."""
    trajectory = rollout.trajectory
    plans = plan_steps(state, trajectory.coefficients, steps)
    return Batch(rollout, advantages, rollout.log_prob, trajectory.velocity, plans)


@dataclass(frozen=True)
class Samples:
    """The samples of a backward pass on the policy's device, with all that passes at any step ask for.

    latents [T+1, b, C, H, W]; log_prob of the rollout and old_log_prob [S, b, H, W], of which the first is that of the
    step `first_noisy`, as old_velocity [S, b, C, H, W], or None; weights [T, b, h, w], or None; advantages [b];
    timesteps [T] and coefficients of the T steps, and the plans of those trained on; conditioning and guidance of b
    samples.
    """

    latents: Tensor
    log_prob: Tensor
    old_log_prob: Tensor
    old_velocity: Tensor | None
    first_noisy: int
    weights: Tensor | None
    advantages: Tensor
    timesteps: Tensor
    coefficients: list[sk.TransitionCoefficients]
    plans: dict[int, StepPlan]
    conditioning: Conditioning
    guidance: Guidance | None


def take(state: TrainingState, batch: Batch, rows: np.ndarray) -> Samples:
    """Some rows of a batch, sent to the device once for all passes that they are in."""
    rollout, policy = batch.rollout, state.policy
    trajectory, device = rollout.trajectory, policy.device
    # Where the rollout is kept on the host it is indexed there.
    index = send(torch.from_numpy(rows), trajectory.latents.device)
    log_prob = send(rollout.log_prob[:, index], device)
    recomputed = batch.old_log_prob is not rollout.log_prob
    return Samples(
        latents=send(trajectory.latents[:, index], device),
        log_prob=log_prob,
        old_log_prob=send(batch.old_log_prob[:, index], device) if recomputed else log_prob,
        old_velocity=None if batch.old_velocity is None else send(batch.old_velocity[:, index], device),
        first_noisy=trajectory.first_noisy,
        weights=None if trajectory.weights is None else send(trajectory.weights[:, index], device),
        advantages=send(torch.from_numpy(batch.advantages[rows]).float(), device),
        timesteps=rollout.timesteps,
        coefficients=trajectory.coefficients,
        plans=batch.plans,
        conditioning=rollout.conditioning[torch.from_numpy(rollout.groups[rows])],
        guidance=policy.guidance(len(rows), state.config.rollout.guidance_scale),
    )


@dataclass(frozen=True)
class Part:
    """One optimiser step's samples: `size` over all processes, and this process's in the batches of its passes.

    Every process has the same number of batches, so that all run the model equally often; they may be empty.
    """

    size: int
    chunks: list[np.ndarray]


def passes_of(
    state: TrainingState, batch: Batch, part: Part, steps: list[int]
) -> Iterator[tuple[int, np.ndarray, Samples, int]]:
    """Each pass of an optimiser step: the number of its rows' batch, the rows, those samples and the denoising step."""
    for chunk, rows in enumerate(part.chunks):
        # A process that has no samples left goes along with one that weighs nothing.
        samples = take(state, batch, rows if len(rows) else np.zeros(1, dtype=np.int64))
        for step in steps:
            yield chunk, rows, samples, step


@dataclass(frozen=True)
class Pass:
    """A backward pass: the denoising step, the places of the samples and what was measured of them."""

    step: int
    places: np.ndarray
    metrics: dict[str, Tensor]


def divide_samples(places: np.ndarray, processes: int) -> list[np.ndarray]:
    """Divide an optimiser step's samples among the processes, whose shares differ by one sample at most.

    A process keeps what it has drawn (see `own_places`) as far as its share goes; those with less get what others have
    beyond theirs.
    """
    drawn = [places[places % processes == process] for process in range(processes)]
    counts = np.array([len(part) for part in drawn])
    sizes = np.full(processes, len(places) // processes)
    # The larger shares go where most samples are, so that few of them move.
    sizes[np.argsort(-counts, kind="stable")[: len(places) % processes]] += 1
    beyond = np.concatenate([part[size:] for part, size in zip(drawn, sizes, strict=True)])
    ends = np.cumsum(np.maximum(sizes - counts, 0))[:-1]
    lent = np.split(beyond, ends)
    return [np.concatenate([part[:size], more]) for part, size, more in zip(drawn, sizes, lent, strict=True)]


def exchange(accelerator: Accelerator, rollout: Rollout, shares: list[list[np.ndarray]]) -> Rollout:
    """The rollout with those samples that this process trains on and another has drawn.

    Args:
        accelerator: knows the processes.
        rollout: of this process's `own_places`.
        shares: the places that each process trains on, for every optimiser step, from `divide_samples`.
    """
    processes, own = accelerator.num_processes, accelerator.process_index
    trained = [np.concatenate([share[process] for share in shares]) for process in range(processes) if shares]
    moving = [part[part % processes != process] for process, part in enumerate(trained)]
    lent = np.concatenate(moving) if moving else np.zeros(0, dtype=np.int64)
    if len(lent) == 0:
        return rollout
    given = [lent[lent % processes == process] for process in range(processes)]
    most = max(len(part) for part in given)
    # Of one shape in every process: what only makes up the number is the first sample again.
    rows = np.zeros(most, dtype=np.int64)
    rows[: len(given[own])] = given[own] // processes
    position = {
        place: process * most + i for process, part in enumerate(given) for i, place in enumerate(part.tolist())
    }
    wanted = torch.tensor([position[place] for place in moving[own].tolist()], dtype=torch.int64)

    def with_wanted(values: Tensor) -> Tensor:
        """[*, B, ...] of this process's samples, and of those that it gets."""
        everywhere = gather(accelerator, values[:, torch.from_numpy(rows)].transpose(0, 1)).transpose(0, 1)
        return torch.cat([values, everywhere[:, wanted]], dim=1)

    return replace(
        rollout,
        trajectory=rollout.trajectory.changed(with_wanted),
        rewards=with_wanted(torch.from_numpy(rollout.rewards)[None])[0].numpy(),
        places=np.concatenate([rollout.places, moving[own]]),
    )


def own_part(share: list[np.ndarray], rollout: Rollout, process: int, batch_size: int) -> Part:
    """The rows of `rollout` that this process trains on in an optimiser step, in batches of `batch_size` at most."""
    order = np.argsort(rollout.places)
    rows = order[np.searchsorted(rollout.places, share[process], sorter=order)]
    batches = math.ceil(max(len(places) for places in share) / batch_size)
    return Part(sum(len(places) for places in share), np.array_split(rows, batches))


def method_weights(state: TrainingState, rollout: Rollout, rng: np.random.Generator) -> Tensor | None:
    """The maps of this process's samples, as the method has them."""
    method, weights, size = state.config.method, rollout.trajectory.weights, rollout.group_size
    if method != "shuffled" or weights is None:
        return control_weights(method, weights, size, rng)
    # Maps are exchanged between all groups, those of other processes as well.
    total = len(rollout.drawn) * size
    everywhere = gather_samples(state.accelerator, weights.transpose(0, 1), total).transpose(0, 1)
    exchanged = control_weights(method, everywhere, size, rng)
    assert exchanged is not None, "the method has maps"
    return exchanged[:, torch.from_numpy(np.minimum(rollout.places, total - 1))]


@contextmanager
def attention_of_the_rollout(state: TrainingState) -> Iterator[None]:
    """Within this context the transformer's attention gives bit for bit what it gave while maps were recorded."""
    config = state.config
    if not config.uses_maps:
        yield
        return
    with sk.record_attention(state.policy.transformer, None, backend=config.backend, **config.allocation.recorded):
        yield


def predict(state: TrainingState, samples: Samples, step: int, *, reference: bool = False) -> Prediction:
    """What the policy, or the model that training started from, predicts for some samples at one denoising step."""
    call = state.policy.predict_reference if reference else state.policy.predict
    return call(samples.latents[step], samples.timesteps[step], samples.conditioning, samples.guidance)


def step_loss(state: TrainingState, samples: Samples, step: int) -> tuple[sk.PolicyLoss, Prediction]:
    """The objective of one denoising step on some samples, and the prediction it was made of."""
    config, plan, place = state.config, samples.plans[step], step - samples.first_noisy
    reference = None
    with attention_of_the_rollout(state):
        if config.train.kl_weight > 0.0:
            reference = predict(state, samples, step, reference=True).guided
        prediction = predict(state, samples, step)
    loss = sk.policy_loss(
        prediction.velocity,
        samples.latents[step],
        samples.latents[step + 1],
        samples.old_log_prob[place],
        # The policy term is in proportion to it, and the KL does not have it.
        samples.advantages * plan.weight,
        samples.coefficients[step],
        weights=None if samples.weights is None else samples.weights[step],
        objective=config.train.objective,
        old_velocity=None if samples.old_velocity is None else samples.old_velocity[place],
        clip_range=plan.clip_range,
        divergence_limit=config.train.divergence_limit,
        granularity=config.train.granularity,
        reference_velocity=reference,
        kl_weight=config.train.kl_weight,
        kl_scale=config.train.kl_scale,
        unconditional_velocity=prediction.unconditional,
        guidance_scale=prediction.scale,
        backend=config.backend,
    )
    return loss, prediction


def plan_steps(
    state: TrainingState, coefficients: list[sk.TransitionCoefficients], steps: list[int]
) -> dict[int, StepPlan]:
    """Temporal weight and clip range of each step that is trained on, both from that step's coefficients."""
    config, trained = state.config, [coefficients[step] for step in steps]
    limit = config.train.clip_range
    if config.train.granularity == "position":
        _, height, width = state.policy.latent_shape
        limit = sk.position_clip_range(limit, height, width)
    weights, spreads = [1.0] * len(steps), [1.0] * len(steps)
    if config.allocation.temporal != "none":
        weights = sk.temporal_weights(trained, kind=config.allocation.temporal).tolist()
    if config.train.clip_range_by_step == "spread":
        # A change of the velocity moves a log-ratio by |b|/s times as much: the root of one over these weights.
        spread = sk.temporal_weights(trained, kind="velocity").rsqrt()
        spreads = (spread / spread.mean()).tolist()
    return {
        step: StepPlan(weight, limit * spread) for step, weight, spread in zip(steps, weights, spreads, strict=True)
    }


def log_prob(state: TrainingState, samples: Samples, step: int, prediction: Prediction) -> Tensor:
    """The log-prob [b, H, W] of the rollout's transitions under the policy that makes `prediction`."""
    return sk.transition_log_prob(
        prediction.velocity.detach(),
        samples.latents[step],
        samples.latents[step + 1],
        samples.coefficients[step],
        unconditional_velocity=prediction.unconditional,
        guidance_scale=prediction.scale,
        backend=state.config.backend,
    )


def log_ratio(state: TrainingState, difference: Tensor) -> Tensor:
    """|log-ratio|, mean and largest [2], at the run's granularity, from log-probs' `difference` [b, H, W]."""
    if state.config.train.granularity == "image":
        difference = difference.mean((-2, -1))
    return torch.stack([difference.abs().mean(), difference.abs().max()])


def divergence(difference: Tensor, channels: int) -> Tensor:
    """The mean divergence from the policy that sampled, estimated from log-ratios [b, H, W] of its own samples.

    Over what it drew, the square of a position's log-ratio is 2·D/C on average where D is small (docs/method.md,
    section 5): neither weights nor the ratio's granularity have a part in it.
    """
    return 0.5 * channels * difference.square().mean()


@torch.no_grad()
def recompute(state: TrainingState, batch: Batch, steps: list[int], parts: list[Part]) -> tuple[Batch, list[Tensor]]:
    """The batch with what was old as training passes see it, and how far the rollout's log-probs are from theirs."""
    old = batch.rollout.log_prob.clone()
    old_velocity = None if batch.old_velocity is None else batch.old_velocity.clone()
    differences: list[Tensor] = []
    state.policy.transformer.train()
    for part in parts:
        found: list[Tensor] = []
        predicted: list[Tensor] = []
        for _, rows, samples, step in passes_of(state, batch, part, steps):
            with attention_of_the_rollout(state):
                prediction = predict(state, samples, step)
            if len(rows) == 0:
                continue
            found.append(log_prob(state, samples, step, prediction))
            predicted.append(prediction.guided)
            differences.append(log_ratio(state, found[-1] - samples.log_prob[step - samples.first_noisy]))
            if step == steps[-1]:
                places = torch.tensor(steps)[:, None] - samples.first_noisy
                old[places, torch.from_numpy(rows)] = torch.stack(found).to(old.device)
                if old_velocity is not None:
                    old_velocity[places, torch.from_numpy(rows)] = torch.stack(predicted).to(old_velocity)
                found.clear()
                predicted.clear()
    state.policy.transformer.eval()
    return replace(batch, old_log_prob=old, old_velocity=old_velocity), differences


def rollout_agreement(accelerator: Accelerator, differences: list[Tensor]) -> dict[str, float]:
    """How well training passes agree with the rollout before anything is updated, over all processes."""
    own = torch.stack(differences).float().cpu() if differences else torch.zeros(0, 2)
    values = torch.cat([own.sum(0)[:1], own.amax(0)[1:] if differences else torch.zeros(1), torch.tensor([len(own)])])
    gathered = gather(accelerator, values[None])
    if gathered[:, 2].sum() == 0:
        return {}
    return {
        "log_ratio_mean": float(gathered[:, 0].sum() / gathered[:, 2].sum()),
        "log_ratio_max": float(gathered[:, 1].max()),
    }


def warn_of_disagreement(state: TrainingState, agreement: dict[str, float], limit: float) -> None:
    """Say once, at a start's first update, that ratios are not 1 before it where that is not small to the clip range.

    Old log-probs that are computed again cannot disagree, and objectives that do not clip hardly care.
    """
    config, largest = state.config, agreement.get("log_ratio_max", 0.0)
    if state.agreement_checked or config.train.old_log_prob == "recompute" or not agreement:
        return
    state.agreement_checked = True
    if config.train.objective in ("none", "dppo"):
        return
    if largest > _SMALL_DISAGREEMENT * limit and state.accelerator.is_main_process:
        _log.warning(
            "before any update the log-ratio of training passes to the rollout reaches %.1e where the clip range is "
            "%.1e: set train.old_log_prob=recompute, or rollout.batch_size to train.batch_size",
            largest,
            limit,
        )


def choose_steps(coefficients: list[sk.TransitionCoefficients], fraction: float, rng: np.random.Generator) -> list[int]:
    """The denoising steps of this iteration: a share of those with noise, drawn without repetition, in order."""
    noisy = [step for step, row in enumerate(coefficients) if row.stochastic]
    count = max(1, round(fraction * len(noisy)))
    return sorted(rng.choice(noisy, count, replace=False).tolist())


MEANS = ("loss", "policy_loss", "clip_fraction", "ratio_mean", "approx_kl", "divergence")
# Those that are told by step, too.
BY_STEP = ("clip_fraction", "divergence")


def summarise(
    accelerator: Accelerator, passes: list[Pass], steps: list[int], norm: Tensor, *, with_kl: bool
) -> dict[str, float]:
    """Means over the samples of all processes (sums of counts, extremes of extremes); reads the device once."""
    names = [*MEANS, "kl"] if with_kl else list(MEANS)
    samples = [[float(len(entry.places) * (entry.step == step)) for entry in passes] for step in steps]
    counts = send(torch.tensor(samples, dtype=torch.float64), accelerator.device)

    def column(name: str) -> Tensor:
        return torch.stack([entry.metrics[name].double() for entry in passes]).to(accelerator.device)

    cells = len(names) * len(steps)
    own = torch.zeros(cells + len(steps) + 3, dtype=torch.float64, device=accelerator.device)
    own[-2], own[-1] = float("inf"), float("-inf")
    if passes:
        sums = [(column(name) * row).sum() for name in names for row in counts]
        last = [column("non_finite").sum(), column("ratio_min").amin(), column("ratio_max").amax()]
        own = torch.stack([*sums, *counts.sum(1), *last])
    norm = norm.to(own)
    everywhere = gather(accelerator, torch.cat([own, norm[None]])[None]).cpu()
    total = everywhere.sum(0)
    sums_by_step = total[:cells].view(len(names), len(steps))
    counts_by_step = total[cells : cells + len(steps)]
    by_step = sums_by_step / counts_by_step
    means = dict(zip(names, (sums_by_step.sum(1) / counts_by_step.sum()).tolist(), strict=True))
    return means | {
        "non_finite": float(total[-4]),
        "ratio_min": float(everywhere[:, -3].min()),
        "ratio_max": float(everywhere[:, -2].max()),
        "gradient_norm": float(everywhere[0, -1]),
        **{
            f"{name}/step_{step + 1}": value
            for name in BY_STEP
            for step, value in zip(steps, by_step[names.index(name)].tolist(), strict=True)
        },
    }


def skip_update(state: TrainingState, what: str, where: str = "") -> None:
    """Leave the weights as they are, warn of what was wrong and where, and end the run when it keeps happening.

    `where` is what this process knows of it, and empty if that is nothing.
    """
    state.optimizer.zero_grad()
    state.skipped_in_a_row += 1
    message = f"update skipped ({state.skipped_in_a_row} in a row): {what}"
    if where or state.accelerator.is_main_process:
        _log.warning("%s; %s", message, where or "every loss of this process was finite")
    if state.skipped_in_a_row >= state.config.train.max_skipped_updates:
        raise NonFiniteError(f"{message}. Training ends here: lower train.learning_rate or use a wider model.dtype")
