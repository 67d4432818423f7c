"""Group-relative advantages and the maps of the controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from star_trainer.algorithms.advantages import control_weights, group_advantages


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_advantages_of_a_group_have_mean_zero_and_unit_spread(groups: int, size: int, seed: int) -> None:
    rewards = np.random.default_rng(seed).normal(size=groups * size)
    result = group_advantages(rewards, size, clip=100.0)
    values = result.values.reshape(groups, size)
    spread = rewards.reshape(groups, size).std(axis=1)
    np.testing.assert_allclose(values.mean(axis=1), 0.0, atol=1e-9)
    np.testing.assert_allclose(values.std(axis=1), spread / (spread + 1e-4), rtol=1e-9)
    assert result.kept.all() and result.dropped == 0.0


def test_the_batch_spread_divides_every_group_alike() -> None:
    rewards = np.array([0.0, 1.0, 0.0, 4.0])
    result = group_advantages(rewards, 2, std="batch")
    np.testing.assert_allclose(result.values, np.array([-0.5, 0.5, -2.0, 2.0]) / (rewards.std() + 1e-4))


def test_groups_without_spread_are_dropped_and_counted() -> None:
    result = group_advantages(np.array([1.0, 1.0, 0.0, 1.0]), 2)
    assert result.kept.tolist() == [False, False, True, True]
    assert result.dropped == 0.5
    np.testing.assert_array_equal(result.values[:2], 0.0)


def test_advantages_are_clipped() -> None:
    rewards = np.array([0.0] * 15 + [1.0])
    assert group_advantages(rewards, 16, clip=2.0).values.max() == 2.0


@pytest.mark.parametrize(
    ("rewards", "options", "named"),
    [
        (np.zeros(5), {"group_size": 2}, "rewards"),
        (np.zeros(0), {"group_size": 2}, "rewards"),
        (np.zeros((2, 2)), {"group_size": 2}, "rewards"),
        (np.array([0.0, np.nan]), {"group_size": 2}, "rewards"),
        (np.zeros(4), {"group_size": 2, "std": "all"}, "std"),
    ],
)
def test_bad_rewards_are_refused(rewards: np.ndarray, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        group_advantages(rewards, **options)


def _maps(groups: int = 3, size: int = 4) -> torch.Tensor:
    """[T, B, h, w] with mean 1 over every map."""
    weights = torch.rand(5, groups * size, 3, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    return weights / weights.mean((-1, -2), keepdim=True)


def test_uniform_methods_have_no_map() -> None:
    rng = np.random.default_rng(0)
    assert control_weights("uniform", _maps(), 4, rng) is None
    assert control_weights("uniform_position", None, 4, rng) is None


def test_star_uses_the_maps_as_they_are() -> None:
    maps = _maps()
    assert control_weights("star", maps, 4, np.random.default_rng(0)) is maps


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_maps_come_from_another_prompt_and_each_is_used_once(seed: int) -> None:
    maps = _maps()
    shuffled = control_weights("shuffled", maps, 4, np.random.default_rng(seed))
    assert shuffled is not None
    sources = [next(j for j in range(12) if torch.equal(shuffled[:, i], maps[:, j])) for i in range(12)]
    assert sorted(sources) == list(range(12))
    assert all(source // 4 != i // 4 for i, source in enumerate(sources))


def test_inverted_maps_reverse_the_order_and_keep_mean_one() -> None:
    maps = _maps()
    inverted = control_weights("inverted", maps, 4, np.random.default_rng(0))
    assert inverted is not None
    torch.testing.assert_close(inverted.mean((-1, -2)), torch.ones(5, 12))
    assert (inverted >= 0).all()
    assert torch.equal(inverted.flatten(2).argsort(-1), maps.flatten(2).argsort(-1, descending=True))


@pytest.mark.parametrize(
    ("method", "maps", "size"), [("best", _maps(), 4), ("star", None, 4), ("shuffled", _maps(groups=1), 4)]
)
def test_controls_that_cannot_be_made_are_refused(method: str, maps: torch.Tensor | None, size: int) -> None:
    with pytest.raises(ValueError, match="method|weights"):
        control_weights(method, maps, size, np.random.default_rng(0))
