"""The training loop: sample, reward, allocate, update (docs/method.md, sections 1 to 5), or R0's (section 8)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from star_trainer.algorithms.policy_gradient import policy_gradient_iteration
from star_trainer.algorithms.r0 import (
    load_supervision,
    own_share,
    parts,
    reward_gradient_iteration,
    stop_reason,
)
from star_trainer.config import Config, TrainerError
from star_trainer.families.devices import own_worker
from star_trainer.prompts import Prompt
from star_trainer.prompts.units import UnitExtractor
from star_trainer.prompts.units.cache import CacheError
from star_trainer.prompts.units.chat import ChatError
from star_trainer.rewards import (
    Models,
    RewardError,
    WeightedSum,
    check_differentiable,
    differentiable_terms,
    held_out_scorer,
    held_out_terms,
    load_terms,
    weighted_sum,
)
from star_trainer.run.checkpoint import CheckpointError, set_aside
from star_trainer.run.evaluation import HeldOut
from star_trainer.run.export import export
from star_trainer.run.inputs import check_backend, check_prompts, check_trackers, load_prompts, units_not_found
from star_trainer.run.interruption import Interrupted, listening
from star_trainer.run.log import Iteration, RunLog
from star_trainer.run.processes import (
    OutOfMemory,
    fail_together,
    gather,
    gather_array,
    lacks_memory,
    locked_folder,
    lost_process,
)
from star_trainer.run.randomness import numpy_stream
from star_trainer.run.snapshots import folder_of as snapshots_of
from star_trainer.run.snapshots import keep_snapshot
from star_trainer.run.state import TrainingState, build_state
from star_trainer.sampling import missing_units, text_units

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
    check_trackers(config.run.trackers)
    check_prompts(config)
    if config.trains_by_reward_gradient:
        check_differentiable(config.reward)
    draw_training, draw_held_out = load_prompts(config.prompts)
    models = Models(config.reward)
    terms = load_terms(config.reward, held_out_terms(config.reward), models)
    reward = weighted_sum(config.reward, terms)
    prompts = draw_held_out(numpy_stream(config.run.seed, "held-out"), config.evaluation.prompts)
    extractor = UnitExtractor(config.units) if config.uses_maps else None
    state = build_state(config)
    accelerator = state.accelerator
    supervision = None
    if config.trains_by_reward_gradient:
        supervision = load_supervision(config, differentiable_terms(reward.terms), state.policy)
    if extractor is not None:
        shown = config.evaluation.pictures
        prompts[:shown] = fail_together(accelerator, lambda: extractor.fill(prompts[:shown]), *OUTSIDE)
    diversity = models.diversity() if config.evaluation.group > 1 else None
    held_out = HeldOut(state, prompts, held_out_scorer(config, terms), diversity)
    folder = Path(config.run.folder)

    def draw(iteration: int) -> list[Prompt]:
        return draw_training(numpy_stream(config.run.seed, "prompts", iteration), config.rollout.prompts)

    def texts(iteration: int) -> list[str]:
        """What this process has to encode: groups are spread over the processes, but not R0's samples."""
        drawn = [prompt.text for prompt in draw(iteration)]
        if supervision is None:
            return drawn
        own = np.concatenate([own_share(part, accelerator) for part in parts(config, iteration)])
        return [drawn[place // config.rollout.samples] for place in own]

    with locked_folder(folder, accelerator):
        if not config.run.resume and accelerator.is_main_process:
            set_aside(folder / "checkpoints")
            set_aside(snapshots_of(folder))
        accelerator.wait_for_everyone()
        log = RunLog(state, resumed=state.restore(folder / "checkpoints"))
        # The log ends what connects the processes, which saving needs.
        with listening(), log, saved_on_failure(state, folder / "checkpoints"), _worker() as worker:
            iterate: Callable[[list[Prompt], int], Iteration]
            if supervision is None:
                iterate = partial(policy_gradient_iteration, state, reward, worker)
            else:
                iterate = partial(reward_gradient_iteration, state, supervision)
            if accelerator.is_main_process and (line := units_not_found(config)) is not None:
                log.say(line)
            if not held_out.take_up_base():
                log.say(f"measuring the base model on {len(prompts)} held-out prompts")
                held_out.evaluate_base()
            log.evaluated_base(held_out)
            if state.stopped:
                log.say(f"nothing left to train: it was stopped after {state.iteration} iterations, {state.stopped}")
            elif state.iteration >= config.train.iterations:
                log.say(
                    f"nothing left to train: {state.iteration} iterations are done, train.iterations is "
                    f"{config.train.iterations} (run.resume=false starts anew)"
                )

            def evaluate(count: int | None = None) -> None:
                with state.averaged_weights():
                    held_out.evaluate(count)
                    log.evaluated(held_out)
                    keep_snapshot(state, held_out)
                    log.report(held_out)

            encoded = state.iteration
            for iteration in range(state.iteration, state.iteration if state.stopped else config.train.iterations):
                if iteration == encoded:
                    encoded = min(iteration + config.rollout.encode_ahead, config.train.iterations)
                    ahead = [text for later in range(iteration, encoded) for text in texts(later)]
                    # Guidance asks for the prediction without a prompt.
                    state.policy.encode_ahead([*ahead, ""] if config.method == "r0_plus" else ahead)
                drawn = draw(iteration)
                if extractor is not None:
                    if config.units.source == "llm" and accelerator.num_processes > 1:
                        # Each asks for its share; the cache then answers what the others have asked.
                        share = drawn[accelerator.process_index :: accelerator.num_processes]
                        fail_together(accelerator, partial(extractor.fill, share), *OUTSIDE)
                    drawn = fail_together(accelerator, partial(extractor.fill, drawn), *OUTSIDE)
                done = iterate(drawn, iteration)
                if extractor is not None:
                    done.metrics.update(missing_units(text_units(state.policy, drawn)))
                    if config.units.source == "llm":
                        done.metrics["units_by_rules_instead"] = float(extractor.replaced)
                    log.units(done.metrics)
                done.metrics.update(term_means(state, reward))
                state.iteration = iteration + 1
                log.iteration(done)

                last = state.iteration == config.train.iterations
                if last or state.iteration % config.evaluation.every == 0:
                    evaluate(None if last else config.evaluation.interim_prompts)
                if supervision is not None and not last:
                    stopped = stop_reason(config, done.metrics, held_out.watched())
                    # Decided together: numbers that differ by rounding must not leave some processes behind.
                    if gather(accelerator, torch.tensor([stopped is not None])).any():
                        state.stopped = stopped or "another process says so"
                if last or state.stopped or state.iteration % config.checkpoints.every == 0:
                    state.save(folder / "checkpoints")
                if state.stopped:
                    log.say(f"stopped after {state.iteration} iterations: {state.stopped}")
                    break
            if not held_out.is_complete:
                # Stopped early, or everything was done before this start: what is left is to measure it.
                evaluate()
            with state.averaged_weights():
                export(state, folder)
            log.report(held_out, last=True)
            return log.finish(held_out)


def term_means(state: TrainingState, reward: WeightedSum) -> dict[str, float]:
    """What each term gave the iteration's images of all processes on average, and how many passed each gate; empty
    where `reward` was not asked.
    """
    images, *totals = gather_array(state.accelerator, reward.take_totals()[None]).sum(axis=0).tolist()
    return {name: total / images for name, total in zip(reward.logged, totals, strict=True) if images}


@contextmanager
def _worker() -> Iterator[Executor]:
    """A thread for rewards; what still waits for it when training fails is dropped."""
    worker = own_worker()
    try:
        yield worker
    finally:
        worker.shutdown(wait=False, cancel_futures=True)


@contextmanager
def saved_on_failure(state: TrainingState, root: Path) -> Iterator[None]:
    """Save what was trained so far when a signal or a failure ends the run.

    What is raised in all processes is answered by all; a process that stands alone, out of memory in an update or with
    others that are gone, saves alone. The weights are saved as they are: those of the last iteration, and the optimiser
    steps since. Where that iteration has its checkpoint already, this stays.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (TrainerError, Interrupted) as error:
        if state.iteration == 0:
            raise
        if state.saved_iteration != state.iteration:
            state.save(root)
        text = f"{error}. {state.iteration} iterations are saved; the same command goes on from there"
        if isinstance(error, Interrupted):
            raise Interrupted(text, error.number) from error
        raise _said_anew(error, text) from error
    except (MemoryError, RuntimeError) as error:
        if not (lacks_memory(error) or lost_process(error)):
            raise
        saved = state.iteration > 0 and state.save_alone(root)
        if not lacks_memory(error):
            raise
        text = f"{OutOfMemory(error)}. "
        text += f"{state.iteration} iterations are saved; " if saved else ""
        raise TrainerError(f"{text}the same command goes on from the last checkpoint") from error


def _said_anew(error: TrainerError, text: str) -> TrainerError:
    """An error of the same kind that says something else."""
    other = copy.copy(error)
    other.args = (text,)
    return other
