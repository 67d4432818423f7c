"""Means, intervals and paired comparisons: what evaluations, summaries and studies say of how sure a number is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_RESAMPLES = 9999


@dataclass(frozen=True)
class Mean:
    """The mean of n values with its 95 % interval; NaN bounds where n is below 2."""

    value: float
    low: float
    high: float
    n: int


def student_mean(values: Sequence[float] | np.ndarray) -> Mean:
    """The mean of values [n] with the interval by Student's t; NaN where there are none."""
    data = np.asarray(values, dtype=np.float64)
    center = float(data.mean()) if len(data) else math.nan
    if len(data) < 2:
        return Mean(center, math.nan, math.nan, len(data))
    half = float(stats.t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data)))
    return Mean(center, center - half, center + half, len(data))


def bootstrap_mean(groups: Sequence[np.ndarray]) -> Mean:
    """The mean over groups of each group's mean, with the interval of values drawn anew within each group.

    Each group is [n] float; the bounds (percentiles) are NaN where one has fewer than two values.
    """

    def mean_of_means(*resampled: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([values.mean(axis=axis) for values in resampled], axis=0)

    mean, count = float(mean_of_means(*groups)), sum(map(len, groups))
    if min(map(len, groups)) < 2:
        return Mean(mean, math.nan, math.nan, count)
    interval = stats.bootstrap(
        tuple(groups),
        mean_of_means,
        n_resamples=_RESAMPLES,
        batch=500,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Mean(mean, float(interval.low), float(interval.high), count)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of after − before over the same cases, with its 95 % interval and p-value (paired t-test)."""

    mean: float
    low: float
    high: float
    p_value: float

    @property
    def verdict(self) -> str:
        """What the interval says."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no clear difference"


def paired_difference(before: np.ndarray, after: np.ndarray, groups: Sequence[str] | None = None) -> PairedDifference:
    """Compare two scores of the same N cases, each [N].

    Cases of one group, such as images of the same prompt, are not independent of each other: with their N `groups` the
    interval is that of as many independent ones as there are groups (standard error robust to clusters, Student's t).
    It is NaN where there is only one.

    Raises:
        ValueError: fewer than two pairs, or lengths that differ.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) < 2:
        raise ValueError(
            f"after: expected the shape of before, [N >= 2], got {list(before.shape)}, {list(after.shape)}"
        )
    difference = after.astype(np.float64) - before
    mean = float(difference.mean())
    if not difference.any():
        return PairedDifference(0.0, 0.0, 0.0, 1.0)
    places = np.arange(len(difference))
    if groups is not None:
        _, places = np.unique(np.array(groups, dtype=object), return_inverse=True)
    deviations = np.bincount(places, difference - mean)
    count = len(deviations)
    error = math.sqrt((deviations**2).sum() * count / (count - 1)) / len(difference) if count > 1 else 0.0
    if np.ptp(difference) == 0.0 or error == 0.0:
        # Without any spread the t statistic is 0/0: there is no telling how sure that is.
        return PairedDifference(mean, math.nan, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, count - 1)) * error
    return PairedDifference(mean, mean - half, mean + half, float(2.0 * stats.t.sf(abs(mean) / error, count - 1)))
