"""What a step along each arm's mean gradient gains: equally long steps from one policy, on the same fresh rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from star_trainer.algorithms.rollout import collect
from star_trainer.families.devices import own_worker
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardFunction
from star_trainer.run.inputs import PromptSource
from star_trainer.run.randomness import numpy_stream
from star_trainer.run.state import TrainingState
from star_trainer.run.statistics import paired_difference

# Iterations of the rollouts' random numbers that neither training nor the gradients reach.
_FIRST_ITERATION = 2_000_000


@dataclass(frozen=True)
class Progress:
    """The mean reward after a step against an arm's mean gradient, less that before it.

    Attributes:
        arm, kind: whose gradient, and how its denoising steps are weighed.
        length: of the step, in the Euclidean norm of the trained parameters.
        gain, low, high: mean and 95 % interval (t) over `n` rollout batches, paired by prompts and noise.
    """

    arm: str
    kind: str
    length: float
    gain: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Measured:
    """What was measured, and the fault or the interrupt that ended it early, if there was one."""

    rows: list[Progress]
    failure: BaseException | None


def measure_progress(
    state: TrainingState,
    draw: PromptSource,
    reward: RewardFunction,
    means: Mapping[tuple[str, str], Tensor],
    batches: int,
    lengths: Sequence[float],
    fill: Callable[[Sequence[Prompt]], list[Prompt]],
) -> Measured:
    """The gains of equally long steps from the state's weights, which stay as they are.

    Args:
        means: mean gradients of the loss [P] by arm and kind of temporal weights.
        batches: rollout batches that judge, at least 2.
        lengths: of the steps, in those of the optimiser, which move every parameter by about the learning rate.

    A KeyboardInterrupt or a fault ends the measurement: the result is that of the batches so far, none of fewer than
    two. An arm whose mean gradient is zero, or not finite, has no direction and no row.
    """
    config = state.config
    means = {key: mean for key, mean in means.items() if 0.0 < float(mean.norm()) < math.inf}
    if not means:
        return Measured([], None)
    unit = config.train.learning_rate * math.sqrt(next(iter(means.values())).numel())
    keys = [(*key, unit * length) for length in lengths for key in means]
    rewards: list[list[float]] = []
    failure: BaseException | None = None
    with own_worker() as worker:
        try:
            for batch in tqdm(range(batches), unit="batch", desc="progress", disable=None):
                place = _FIRST_ITERATION + batch
                prompts = fill(draw(numpy_stream(config.run.seed, "prompts", place), config.rollout.prompts))
                row = []
                for step in (torch.zeros(()), *(_against(means[arm, kind], length) for arm, kind, length in keys)):
                    with _moved(state, step):
                        rollout = collect(state.policy, config, prompts, reward, worker, place)
                    row.append(float(rollout.rewards.mean()))
                rewards.append(row)
        except (KeyboardInterrupt, Exception) as error:
            tqdm.write(f"progress: stopped after {len(rewards)} of {batches} batches")
            failure = error
    if len(rewards) < 2:
        return Measured([], failure)
    before, *after = np.array(rewards).T
    gains = [paired_difference(before, found) for found in after]
    rows = [Progress(*key, g.mean, g.low, g.high, len(rewards)) for key, g in zip(keys, gains, strict=True)]
    return Measured(rows, failure)


def _against(gradient: Tensor, length: float) -> Tensor:
    return -length * gradient / gradient.norm()


@contextmanager
def _moved(state: TrainingState, step: Tensor) -> Iterator[None]:
    """Within this context the trained parameters have `step` [P] added to them; one without dimensions is 0."""
    parameters = list(state.policy.trainable().values())
    before = [parameter.detach().clone() for parameter in parameters]
    sizes = [parameter.numel() for parameter in parameters]
    with torch.no_grad():
        for parameter, part in zip(parameters, step.expand(sum(sizes)).split(sizes), strict=True):
            parameter.add_(part.view_as(parameter).to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)


def progress_table(found: Sequence[Progress]) -> str:
    """Markdown: the gains, by arm and kind of temporal weights."""
    if not found:
        return ""
    lines = ["| a step along the mean gradient of | weights of the steps | length | reward gained | n |"]
    lines += ["|---" * 5 + "|"]
    for own in found:
        interval = f" [{own.low:+.4f}, {own.high:+.4f}]" if math.isfinite(own.low) else ""
        lines += [f"| {own.arm} | {own.kind} | {own.length:.3g} | {own.gain:+.4f}{interval} | {own.n} |"]
    return "\n".join([*lines, ""])
