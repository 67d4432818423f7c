"""Several rewards as one: floors, gates and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from star_trainer.config import Reward
from star_trainer.prompts import Prompt
from star_trainer.rewards.named import RewardFunction


def open_gates(config: Reward, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By gated term, where what it hangs on is met: [B] bool, from each term's values [B]."""
    return {
        name: np.logical_and.reduce([values[other] >= least for other, least in gate.items()])
        for name, gate in config.gates.items()
    }


def counted(config: Reward, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each term counts, [B]: at least its floor, and where its gate is closed its floor, or 0 without one."""
    result = {name: np.maximum(found, config.floors.get(name, -np.inf)) for name, found in values.items()}
    for name, is_open in open_gates(config, values).items():
        result[name] = np.where(is_open, result[name], config.floors.get(name, 0.0))
    return result


def weighted(config: Reward, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sum [B] of what the terms count, with their weights."""
    what = counted(config, {name: values[name] for name in config.terms})
    return sum_of(config, np.stack(list(what.values()), axis=1))


def sum_of(config: Reward, each: np.ndarray) -> np.ndarray:
    """The weighted sum [B] of one number for each of the terms, [B, K]."""
    columns = zip(config.terms.values(), each.T, strict=True)
    return sum((weight * column for weight, column in columns), np.zeros(len(each)))


class WeightedSum:
    """The sum of terms from `load_terms` with the weights of the configuration, as one reward.

    Attributes:
        logged: the names of what `take_totals` counts beside the images.
    """

    def __init__(self, config: Reward, terms: Mapping[str, RewardFunction]) -> None:
        self.config = config
        self.terms = {name: terms[name] for name in config.terms}
        self.logged = [*(f"reward_{name}" for name in self.terms), *(f"gate_{name}" for name in config.gates)]
        self._totals = np.zeros(1 + len(self.logged))

    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        return sum_of(self.config, self.each(images, prompts))

    def each(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        """What each term counts, [B, K] in the order of the configuration, without its weight."""
        values = {name: term(images, prompts) for name, term in self.terms.items()}
        gates = open_gates(self.config, values)
        self._totals += [len(prompts), *(found.sum() for found in (*values.values(), *gates.values()))]
        return np.stack(list(counted(self.config, values).values()), axis=1)

    def take_totals(self) -> np.ndarray:
        """How many images were rewarded since this was last asked, and over them the totals of what each term gave and
        of how often each gate was open: [1 + logged].
        """
        taken, self._totals = self._totals, np.zeros_like(self._totals)
        return taken


def weighted_sum(config: Reward, terms: Mapping[str, RewardFunction]) -> WeightedSum:
    """The sum of terms from `load_terms` with the weights of the configuration."""
    return WeightedSum(config, terms)
