"""Training rewards of an ablation's runs: those of one seed have the same prompts and noise, so that they are paired.

An iteration's reward is the mean over its samples. They resolve in tens of iterations what held-out pictures do not:
what differs between two arms is the policy alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from star_trainer.run.statistics import PairedDifference, paired_difference
from star_trainer.studies.ablation.plan import Comparison
from star_trainer.studies.ablation.runs import Run, read_metrics

# Iterations that are averaged: few enough to see when something happens.
BLOCK = 10


@dataclass(frozen=True)
class Training:
    """One run's rewards by iteration, as far as it has come."""

    arm: str
    seed: int
    rewards: list[float]


@dataclass(frozen=True)
class Block:
    """An arm's rewards less the baseline's over some iterations, counted from 1 and both included.

    `error` is the standard error over the n seeds; NaN for one.
    """

    arm: str
    first: int
    last: int
    n: int
    difference: float
    error: float


@dataclass(frozen=True)
class Answer:
    """A planned comparison by one measure; `corrected` is the p-value with Holm's correction over the questions."""

    question: str
    arm: str
    against: str
    measure: str
    n: int
    difference: PairedDifference | None
    corrected: float


def read_training(run: Run) -> Training:
    """The rewards of a run, finished or not."""
    return Training(run.arm, run.seed, [r["reward/mean"] for r in read_metrics(run.folder) if "reward/mean" in r])


def by_seed(trainings: Sequence[Training]) -> dict[str, dict[int, np.ndarray]]:
    """The rewards [iterations] of each arm and seed that has some."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for training in trainings:
        if training.rewards:
            found.setdefault(training.arm, {})[training.seed] = np.array(training.rewards)
    return found


def training_blocks(trainings: Sequence[Training], baseline: str) -> list[Block]:
    """Differences to the baseline by arm and block of iterations, over the seeds whose runs have the whole block."""
    arms = by_seed(trainings)
    reference = arms.get(baseline, {})
    longest = max(map(len, reference.values()), default=0)
    blocks = []
    for arm, runs in arms.items():
        for first in range(0, longest, BLOCK) if arm != baseline else ():
            last = min(first + BLOCK, longest)
            pairs = [(runs[seed][first:last], reference[seed][first:last]) for seed in runs.keys() & reference.keys()]
            differences = [float((a - b).mean()) for a, b in pairs if len(a) == len(b) == last - first]
            if differences:
                count = len(differences)
                error = float(np.std(differences, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
                blocks.append(Block(arm, first + 1, last, count, float(np.mean(differences)), error))
    return blocks


def common_reward(trainings: Sequence[Training]) -> tuple[float, dict[str, int]] | None:
    """A reward that every arm reaches, and the iteration by which each does; None where the arms share no seed.

    Rewards are averaged over the seeds that all arms have, which draw the same prompts, and over `BLOCK` iterations in
    a row; the reward is the best of the arm whose best is the least.
    """
    arms = by_seed(trainings)
    seeds = set.intersection(*(set(runs) for runs in arms.values())) if arms else set()
    length = min((len(runs[seed]) for runs in arms.values() for seed in seeds), default=0)
    if length < BLOCK:
        return None
    window = np.ones(BLOCK) / BLOCK
    smooth = {
        arm: np.convolve(np.mean([runs[seed][:length] for seed in seeds], axis=0), window, mode="valid")
        for arm, runs in arms.items()
    }
    level = min(float(values.max()) for values in smooth.values())
    return level, {arm: int(np.argmax(values >= level)) + BLOCK for arm, values in smooth.items()}


def answers(
    comparisons: Sequence[Comparison], measured: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> list[Answer]:
    """Each question's answer by each measure, from the values by measure, arm and seed.

    A question that fewer than two seeds speak of has no difference, and no part in the correction.
    """
    found = []
    for measure, arms in measured.items():
        differences = []
        for entry in comparisons:
            one, other = arms.get(entry.arm, {}), arms.get(entry.against, {})
            seeds = sorted(one.keys() & other.keys())
            before, after = (np.array([of[seed] for seed in seeds]) for of in (other, one))
            differences.append((len(seeds), paired_difference(before, after) if len(seeds) > 1 else None))
        corrected = holm([math.nan if found is None else found.p_value for _, found in differences])
        found += [
            Answer(entry.question, entry.arm, entry.against, measure, n, difference, p)
            for entry, (n, difference), p in zip(comparisons, differences, corrected, strict=True)
        ]
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values that hold for all of them together (Holm 1979); NaN stays, and does not count."""
    p = np.array(p_values, dtype=np.float64)
    order = [int(place) for place in np.argsort(p) if not np.isnan(p[place])]
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[place]))
        p[place] = largest
    return p.tolist()
