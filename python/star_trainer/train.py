"""The training loop: sample, reward, allocate, update (docs/method.md, sections 1 to 5), or R0's (section 8)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from star_trainer.algorithms.advantages import group_advantages
from star_trainer.algorithms.policy_gradient import update
from star_trainer.algorithms.r0 import improve, load_supervision, stop_reason
from star_trainer.algorithms.rollout import collect
from star_trainer.config import Config
from star_trainer.prompts import Prompt
from star_trainer.prompts.units import UnitExtractor
from star_trainer.prompts.units.cache import CacheError
from star_trainer.prompts.units.chat import ChatError
from star_trainer.rewards import (
    RewardError,
    RewardFunction,
    check_differentiable,
    differentiable_terms,
    load_terms,
    weighted_sum,
)
from star_trainer.run.checkpoint import set_aside
from star_trainer.run.evaluation import evaluate
from star_trainer.run.inputs import check_backend, check_prompts, load_prompts
from star_trainer.run.log import Iteration, RunLog
from star_trainer.run.processes import alone_in, gather, gather_array, together
from star_trainer.run.randomness import numpy_stream
from star_trainer.run.state import TrainingState, build_state

# What can fail although nothing is wrong with the training: a server, a model, a disk.
OUTSIDE = (RewardError, ChatError, CacheError)


def train(config: Config) -> dict[str, object]:
    """Run `config` to its end, or go on with it where it was stopped, and return its summary.

    Raises:
        ConfigError: what can be seen of a bad configuration, before any weights load; another process trains in the
            run's folder.
        ChatError, CacheError: the text units cannot be extracted.
        CheckpointError: a run folder whose checkpoints cannot be used.
        RewardError: a reward that cannot be had; what was trained so far is saved.
        NonFiniteError: too many updates in a row with NaN or infinity.
    """
    check_backend(config.backend)
    check_prompts(config)
    if config.trains_by_reward_gradient:
        check_differentiable(config.reward)
    draw_training, draw_held_out = load_prompts(config.prompts)
    terms = load_terms(config.reward)
    reward = weighted_sum(config.reward, terms)
    held_out = draw_held_out(numpy_stream(config.run.seed, "held-out"), config.evaluation.prompts)
    extractor = UnitExtractor(config.units) if config.uses_maps else None
    state = build_state(config)
    accelerator = state.accelerator
    supervision = None
    if config.trains_by_reward_gradient:
        supervision = load_supervision(config, differentiable_terms(terms), state.policy)
    if extractor is not None:
        shown = config.evaluation.pictures
        filled = together(accelerator, lambda: extractor.fill(held_out[:shown]), *OUTSIDE)
        held_out = [*filled, *held_out[shown:]]
    folder = Path(config.run.folder)
    with alone_in(folder, accelerator):
        if not config.run.resume and accelerator.is_main_process:
            set_aside(folder / "checkpoints")
        accelerator.wait_for_everyone()
        resumed = state.restore(folder / "checkpoints")
        # Whole groups, next to each other: sample i of the iteration is in process i // (samples per process).
        count = config.rollout.prompts // accelerator.num_processes
        first_prompt = count * accelerator.process_index

        def own_prompts(iteration: int) -> list[Prompt]:
            drawn = draw_training(numpy_stream(config.run.seed, "prompts", iteration), config.rollout.prompts)
            return drawn[first_prompt : first_prompt + count]

        running, saving = (
            RunLog(state, held_out, reward, resumed=resumed),
            saved_on_failure(state, folder / "checkpoints"),
        )
        # The log ends what connects the processes, which saving needs.
        with running as log, saving, ThreadPoolExecutor(1) as worker:
            if supervision is None:
                iterate = partial(policy_gradient, state, reward, worker, first_prompt, log)
            else:
                iterate = partial(improve, state, supervision, first_prompt, log)
            log.evaluated_base()
            if state.stopped:
                log.say(f"nothing left to train: it was stopped after {state.iteration} iterations, {state.stopped}")
            elif state.iteration >= config.train.iterations:
                log.say(
                    f"nothing left to train: {state.iteration} iterations are done, train.iterations is "
                    f"{config.train.iterations} (run.resume=false starts anew)"
                )

            def measure(prompts: list[Prompt]) -> None:
                with state.averaged_weights():
                    log.evaluated(evaluate(state.policy, config, prompts, log.scorers, accelerator))

            encoded = state.iteration
            for iteration in range(state.iteration, state.iteration if state.stopped else config.train.iterations):
                if iteration == encoded:
                    encoded = min(iteration + config.rollout.encode_ahead, config.train.iterations)
                    texts = [p.text for later in range(iteration, encoded) for p in own_prompts(later)]
                    # Guidance asks for the prediction without a prompt.
                    state.policy.encode_ahead([*texts, ""] if config.method == "r0_plus" else texts)
                prompts = own_prompts(iteration)
                if extractor is not None:
                    prompts = together(accelerator, partial(extractor.fill, prompts), *OUTSIDE)
                done = iterate(prompts, iteration)
                if extractor is not None and config.units.source == "llm":
                    done.metrics["units_by_rules_instead"] = float(extractor.replaced)
                state.iteration = iteration + 1
                log.iteration(done)

                last = state.iteration == config.train.iterations
                if last or state.iteration % config.evaluation.every == 0:
                    measure(held_out[: None if last else config.evaluation.interim_prompts])
                if supervision is not None and not last:
                    stopped = stop_reason(config, done.metrics, log)
                    # Decided together: numbers that differ by rounding must not leave some processes behind.
                    if gather(accelerator, torch.tensor([stopped is not None])).any():
                        state.stopped = stopped or "another process says so"
                if last or state.stopped or state.iteration % config.checkpoints.every == 0:
                    state.save(folder / "checkpoints")
                if state.stopped:
                    log.say(f"stopped after {state.iteration} iterations: {state.stopped}")
                    break
            if log.latest is None or log.latest_iteration < state.iteration or len(log.latest) < len(held_out):
                # Stopped early, or everything was done before this start: what is left is to measure it.
                measure(held_out)
            return log.finish()


def policy_gradient(
    state: TrainingState,
    reward: RewardFunction,
    worker: Executor,
    first_prompt: int,
    log: RunLog,
    prompts: list[Prompt],
    iteration: int,
) -> Iteration:
    """Sample, reward, compare within groups, and update; `first_prompt` is the place of this process's first one."""
    config, accelerator = state.config, state.accelerator
    sample = partial(collect, state.policy, config, prompts, reward, worker, iteration, first_prompt)
    rollout = together(accelerator, sample, *OUTSIDE)
    rewards = gather_array(accelerator, rollout.rewards)
    advantages = group_advantages(
        rewards, config.rollout.samples, std=config.train.advantage_std, clip=config.train.advantage_clip
    )
    start = time.perf_counter()
    metrics = update(state, rollout, advantages, iteration, log)
    rollout.seconds["update"] = time.perf_counter() - start
    return Iteration(rewards, rollout.seconds, metrics, advantages)


@contextmanager
def saved_on_failure(state: TrainingState, root: Path) -> Iterator[None]:
    """Save what was trained so far when something outside of the trainer (a server, a model, a disk) gives out."""
    try:
        yield
    except OUTSIDE as error:
        if state.iteration == 0:
            raise
        state.save(root)
        raise type(error)(
            f"{error}. {state.iteration} iterations are saved; the same command goes on from there"
        ) from error
