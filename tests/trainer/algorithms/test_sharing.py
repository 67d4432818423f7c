"""The samples of an update are divided so that no process waits for another, whatever groups are left out."""

from __future__ import annotations

import numpy as np
import pytest
from star_trainer.algorithms.policy_gradient import divide_samples


def parts_of(prompts: int, samples: int, updates: int, seed: int) -> list[np.ndarray]:
    """The places of each update's samples where half of the groups have spread, drawn as `update` draws them."""
    rng = np.random.default_rng(seed)
    has_spread = np.repeat(rng.permutation(prompts) < prompts // 2, samples)
    order = rng.permutation(prompts * samples)
    return np.array_split(order[has_spread[order]], updates)


@pytest.mark.parametrize(("processes", "floor"), [(8, 0.95), (32, 0.95)])
def test_hardly_a_pass_is_made_for_nothing_where_half_of_the_groups_are_kept(processes: int, floor: float) -> None:
    used = run = moved = 0
    for seed in range(20):
        for part in parts_of(48, 24, updates=2, seed=seed):
            shares = divide_samples(part, processes)
            used += len(part)
            # All make as many passes as the one with the most samples.
            run += processes * max(map(len, shares))
            moved += sum(int((share % processes != process).sum()) for process, share in enumerate(shares))
    assert used / run >= floor
    # A process has most of what it trains on already.
    assert moved / used < 0.2


@pytest.mark.parametrize("processes", [1, 3, 5])
def test_every_sample_is_trained_on_once_and_by_its_own_process_where_it_can_be(processes: int) -> None:
    (part,) = parts_of(6, 5, updates=1, seed=1)
    shares = divide_samples(part, processes)
    assert sorted(np.concatenate(shares)) == sorted(part)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for process, share in enumerate(shares):
        own = part[part % processes == process]
        np.testing.assert_array_equal(share[: len(own)], own[: len(share)])
    assert len(divide_samples(part[:1], processes)) == processes
