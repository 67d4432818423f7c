"""The training loop: sample, reward, allocate, update (docs/method.md, sections 1 to 5)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import star_kernels as sk
from star_kernels.backends import resolve_backend
from star_trainer.advantages import Advantages, control_weights, group_advantages
from star_trainer.checkpoint import set_aside
from star_trainer.config import Config, ConfigError
from star_trainer.evaluation import evaluate
from star_trainer.logs import RunLog
from star_trainer.prompts import check_prompts, load_prompts
from star_trainer.randomness import numpy_stream
from star_trainer.rewards import load_reward
from star_trainer.rewards.errors import RewardError
from star_trainer.rollout import NonFiniteError, Rollout, collect
from star_trainer.state import TrainingState, build_state
from star_trainer.units import UnitExtractor
from star_trainer.units.cache import CacheError
from star_trainer.units.chat import ChatError


def train(config: Config) -> dict[str, object]:
    """Run `config` to its end, or go on with it where it was stopped, and return its summary.

    Raises:
        ConfigError: what can be seen of a bad configuration, before any weights load.
        ChatError, CacheError: the text units cannot be extracted.
        CheckpointError: a run folder whose checkpoints cannot be used.
        RewardError: a reward that cannot be had; what was trained so far is saved.
        NonFiniteError: too many updates in a row with NaN or infinity.
    """
    check_backend(config.backend)
    check_prompts(config)
    draw_training, draw_held_out = load_prompts(config.prompts)
    reward = load_reward(config.reward)
    held_out = draw_held_out(numpy_stream(config.run.seed, "held-out"), config.evaluation.prompts)
    extractor = UnitExtractor(config.units) if config.uses_maps else None
    if extractor is not None:
        shown = config.evaluation.pictures
        held_out = [*extractor.fill(held_out[:shown]), *held_out[shown:]]
    state = build_state(config)
    folder = Path(config.run.folder)
    if not config.run.resume:
        set_aside(folder / "checkpoints")
    resumed = state.restore(folder / "checkpoints")
    rank, processes = state.accelerator.process_index, state.accelerator.num_processes

    saving, running = saved_on_failure(state, folder / "checkpoints"), RunLog(state, held_out, reward, resumed=resumed)
    with saving, running as log, ThreadPoolExecutor(1) as worker:
        log.evaluated_base()
        if state.iteration >= config.train.iterations:
            log.say(
                f"nothing left to train: {state.iteration} iterations are done, train.iterations is "
                f"{config.train.iterations} (run.resume=false starts anew)"
            )
        for iteration in range(state.iteration, config.train.iterations):
            prompts = draw_training(numpy_stream(config.run.seed, "prompts", iteration), config.rollout.prompts)
            if extractor is not None:
                prompts = extractor.fill(prompts)
            rollout = collect(state.policy, config, prompts[rank::processes], reward, worker, iteration, rank)
            advantages = group_advantages(
                rollout.rewards,
                config.rollout.samples,
                std=config.train.advantage_std,
                clip=config.train.advantage_clip,
            )
            start = time.perf_counter()
            metrics = update(state, rollout, advantages, iteration, log)
            rollout.seconds["update"] = time.perf_counter() - start
            if extractor is not None and config.units.source == "llm":
                metrics["units_by_rules_instead"] = float(extractor.replaced)
            state.iteration = iteration + 1
            log.iteration(rollout, advantages, metrics)

            last = state.iteration == config.train.iterations
            if last or state.iteration % config.evaluation.every == 0:
                count = None if last else config.evaluation.interim_prompts
                with state.averaged_weights():
                    log.evaluated(evaluate(state.policy, config, held_out[:count], log.scorers))
            if last or state.iteration % config.checkpoints.every == 0:
                state.save(folder / "checkpoints")
        if log.latest is None:
            # Everything was done before this start: what is left is to measure it.
            with state.averaged_weights():
                log.evaluated(evaluate(state.policy, config, held_out, log.scorers))
        return log.finish()


@contextmanager
def saved_on_failure(state: TrainingState, root: Path) -> Iterator[None]:
    """Save what was trained so far when something outside of the trainer (a server, a model, a disk) gives out."""
    try:
        yield
    except (CacheError, ChatError, RewardError) as error:
        if state.iteration == 0:
            raise
        state.save(root)
        raise type(error)(
            f"{error}. {state.iteration} iterations are saved; the same command goes on from there"
        ) from error


def check_backend(name: str) -> None:
    """Refuse a backend that cannot run here before anything else is done.

    Raises:
        ConfigError: with the reason.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolve_backend("the training", name, device, kernels=("triton", "cpu"))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def update(
    state: TrainingState, rollout: Rollout, advantages: Advantages, iteration: int, log: RunLog
) -> dict[str, float]:
    """`train.updates` optimiser steps, each on its share of the samples and on the same chosen denoising steps."""
    config, trajectory = state.config, rollout.trajectory
    rng = numpy_stream(config.run.seed, "update", iteration, state.accelerator.process_index)
    steps = choose_steps(
        trajectory.coefficients, config.train.step_fraction, numpy_stream(config.run.seed, "steps", iteration)
    )
    # A stream of its own: the order of the samples must not depend on the method.
    shuffle = numpy_stream(config.run.seed, "shuffle", iteration, state.accelerator.process_index)
    weights = control_weights(config.method, trajectory.weights, config.rollout.samples, shuffle)
    kept = rng.permutation(len(advantages.kept))
    kept = kept[advantages.kept[kept]]
    totals: list[dict[str, float]] = []
    skipped = 0
    for part in np.array_split(kept, config.train.updates):
        if len(part) == 0:
            continue
        state.policy.transformer.train()
        state.optimizer.zero_grad()
        metrics: list[dict[str, Tensor]] = []
        for rows in np.array_split(part, math.ceil(len(part) / config.train.batch_size)):
            for step in steps:
                result = step_loss(state, rollout, advantages, weights, step, torch.from_numpy(rows))
                state.accelerator.backward(result.loss * (len(rows) / len(part) / len(steps)))
                measured = {**result.metrics, "loss": result.loss.detach()}
                if config.train.kl_weight == 0.0:
                    # Without a weight the reference model is not run, and a KL of 0 would be no measurement.
                    del measured["kl"]
                metrics.append(measured)
        state.policy.transformer.eval()
        parameters = list(state.policy.trainable().values())
        norm = state.accelerator.clip_grad_norm_(parameters, config.train.max_gradient_norm)
        summary = summarise(metrics, norm)
        if summary["non_finite"] or not math.isfinite(summary["loss"] + summary["gradient_norm"]):
            skipped += 1
            skip_update(state, metrics, steps, part, summary, log)
        else:
            state.optimizer.step()
            state.average.step(parameters)
            state.skipped_in_a_row = 0
            totals.append(summary)
    counts = {"updates": float(len(totals)), "skipped_updates": float(skipped)}
    if not totals:
        return counts
    return counts | {name: float(np.mean([t[name] for t in totals])) for name in totals[0]}


def step_loss(
    state: TrainingState, rollout: Rollout, advantages: Advantages, weights: Tensor | None, step: int, rows: Tensor
) -> sk.PolicyLoss:
    """The clipped objective of one denoising step on some of the samples."""
    config, policy, trajectory = state.config, state.policy, rollout.trajectory
    assert trajectory.log_prob is not None, "rollouts are drawn with noise"
    sample, embeddings, timestep = trajectory.latents[step, rows], rollout.embeddings[rows], rollout.timesteps[step]
    guidance_scale, unconditional = config.rollout.guidance_scale, None
    if guidance_scale > 1.0:
        with torch.no_grad():
            unconditional = policy.velocity(sample, timestep, policy.encode([""]).expand(len(rows)))
    reference = None
    if config.train.kl_weight > 0.0:
        reference = policy.reference_velocity(sample, timestep, embeddings)
        if guidance_scale > 1.0:
            empty = policy.reference_velocity(sample, timestep, policy.encode([""]).expand(len(rows)))
            reference = empty + guidance_scale * (reference - empty)
    granularity = "image" if config.method == "uniform" else "position"
    # An image's log-ratio averages H*W times as many numbers, so that its spread is sqrt(H*W) times smaller.
    widen = 1.0 if granularity == "image" else math.sqrt(sample.shape[-2] * sample.shape[-1])
    return sk.policy_loss(
        policy.velocity(sample, timestep, embeddings),
        sample,
        trajectory.latents[step + 1, rows],
        trajectory.log_prob[step, rows],
        torch.from_numpy(advantages.values).float().to(sample.device)[rows],
        trajectory.coefficients[step],
        weights=None if weights is None else weights[step, rows],
        clip_range=config.train.clip_range * widen,
        granularity=granularity,
        reference_velocity=reference,
        kl_weight=config.train.kl_weight,
        kl_scale=config.train.kl_scale,
        unconditional_velocity=unconditional,
        guidance_scale=guidance_scale,
        backend=config.backend,
    )


def choose_steps(coefficients: list[sk.TransitionCoefficients], fraction: float, rng: np.random.Generator) -> list[int]:
    """The denoising steps of this iteration: a share of those with noise, drawn without repetition, in order."""
    noisy = [step for step, row in enumerate(coefficients) if row.stochastic]
    count = max(1, round(fraction * len(noisy)))
    return sorted(rng.choice(noisy, count, replace=False).tolist())


def summarise(metrics: list[dict[str, Tensor]], norm: Tensor) -> dict[str, float]:
    """Means over the backward passes of one update (sums of counts, extremes of extremes); reads the device once."""

    def combine(name: str) -> Tensor:
        values = torch.stack([entry[name].float() for entry in metrics])
        if name == "non_finite":
            return values.sum()
        return values.amin() if name == "ratio_min" else values.amax() if name == "ratio_max" else values.mean()

    names = list(metrics[0])
    values = torch.stack([*(combine(name) for name in names), norm.float()]).tolist()
    return dict(zip([*names, "gradient_norm"], values, strict=True))


def skip_update(
    state: TrainingState,
    metrics: list[dict[str, Tensor]],
    steps: list[int],
    part: np.ndarray,
    summary: dict[str, float],
    log: RunLog,
) -> None:
    """Leave the weights as they are, say which step and samples were bad, and end the run when it keeps happening."""
    state.optimizer.zero_grad()
    state.skipped_in_a_row += 1
    bad = [i for i, entry in enumerate(metrics) if entry["non_finite"] > 0 or not torch.isfinite(entry["loss"])]
    chunks = np.array_split(part, max(1, len(metrics) // len(steps)))
    where = [f"step {steps[i % len(steps)]}, samples {chunks[i // len(steps)].tolist()[:8]}" for i in bad[:3]]
    message = (
        f"update skipped ({state.skipped_in_a_row} in a row): loss {summary['loss']}, gradient norm "
        f"{summary['gradient_norm']}, {summary['non_finite']:.0f} non-finite positions; "
        + ("; ".join(where) or "the loss was finite, its gradient was not")
    )
    log.say(message)
    if state.skipped_in_a_row >= state.config.train.max_skipped_updates:
        raise NonFiniteError(f"{message}. Training ends here: lower train.learning_rate or use a wider model.dtype")
