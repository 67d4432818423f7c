"""One harness for all benchmarks: every group has a baseline, and the ratio to it closes the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest


@dataclasses.dataclass
class Timing:
    """Median seconds of one call; the baseline is what the others of its group are compared with."""

    name: str
    median: float
    is_baseline: bool


_TIMINGS = pytest.StashKey[dict[str, list[Timing]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TIMINGS] = {}


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`measure(function, group=..., name=..., baseline=False)` times a call for the table and the ratios."""

    def run(function: Callable[[], object], *, group: str, name: str, baseline: bool = False) -> None:
        benchmark.group = group
        benchmark.name = name
        benchmark.pedantic(function, rounds=30, warmup_rounds=3)
        if benchmark.enabled:
            timing = Timing(name, benchmark.stats.stats.median, baseline)
            request.config.stash[_TIMINGS].setdefault(group, []).append(timing)

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """For each group the baseline's median and how many times as fast the others are, from the same run."""
    groups = config.stash[_TIMINGS]
    if not groups:
        return
    terminalreporter.section("medians and their ratios, measured in this run")
    width = max(map(len, groups))
    for group, timings in groups.items():
        baseline = next((timing for timing in timings if timing.is_baseline), None)
        for timing in timings:
            line = f"{group:<{width}}  {timing.name:<20} {timing.median * 1e3:9.3f} ms"
            if baseline is not None and timing is not baseline:
                line += f"  {baseline.median / timing.median:6.2f}x as fast as {baseline.name}"
            terminalreporter.write_line(line)
