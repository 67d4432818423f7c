"""`pytest bench`: the fixture that benchmarks are written with, and the table and JSON that close a run."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness
from bench.harness import Group, Member

_GROUPS = pytest.StashKey[list[Group]]()
_QUEUE = pytest.StashKey[dict[str, list[Member]]]()
_BUDGETS = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("star_kernels")
    options.addoption("--full", action="store_true", help="measure the long groups too")
    options.addoption(
        "--results",
        type=Path,
        metavar="FILE",
        default=harness.RESULTS / "latest.json",
        help="where the ratios, times and peak memory go as JSON (default: bench/results/latest.json)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a group that takes long and runs with --full only")
    config.stash[_GROUPS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("full"):
        return
    long = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the benchmarks run: the GPU if there is one."""
    return harness.default_device()


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`measure(function, group=..., name=..., baseline=False, work=None, budget=None)` adds a member to a group.

    `work` counts what one call does, by unit, as {"GB": 0.2}: the table then has the rate, GB/s. `budget` asks for more
    seconds than usual for the group, in as many rounds as they allow, where a ratio near 1 is to be told from 1.
    The members that one test adds to a group are timed alternately when the test function has returned.
    """
    queue: dict[str, list[Member]] = {}
    budgets: dict[str, float] = {}
    request.node.stash[_QUEUE], request.node.stash[_BUDGETS] = queue, budgets

    def add(
        function: Callable[[], object],
        *,
        group: str,
        name: str,
        baseline: bool = False,
        work: Mapping[str, float] | None = None,
        budget: float | None = None,
    ) -> None:
        if budget is not None:
            budgets[group] = budget
        queue.setdefault(group, []).append(Member(name, function, baseline, work or {}))

    return add


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    result = yield
    benchmark: Any = pyfuncitem.funcargs.get("benchmark")
    for name, members in pyfuncitem.stash.get(_QUEUE, {}).items():
        if benchmark.disabled:
            for member in members:
                member.function()
            continue
        clock, budget = harness.clock_for(harness.default_device()), pyfuncitem.stash[_BUDGETS].get(name)
        if budget is None:
            group = harness.measure(members, clock, name=name)
        else:
            group = harness.measure(members, clock, name=name, budget=budget, max_rounds=10_000)
        pyfuncitem.config.stash[_GROUPS].append(group)
        _report(benchmark, group)
    return result


def _report(benchmark: Any, group: Group) -> None:
    """Hand the measurements to pytest-benchmark, for its own table, JSON, storage and comparison.

    Its fixture times one function per test and has no public way to take times that were measured elsewhere, so each
    member gets a copy of the fixture, from which pytest-benchmark makes the record.
    """
    benchmark._mode = "measured alternately"
    for measurement in group.measurements:
        fixture = copy.copy(benchmark)
        fixture.group, fixture.name = group.name, measurement.name
        fixture.fullname = f"{benchmark.fullname}::{group.name}::{measurement.name}"
        ratio = group.ratio(measurement.name)
        fixture.extra_info = {"peak_bytes": measurement.peak_bytes, "ratio": None if ratio is None else vars(ratio)}
        record = fixture._make_stats(iterations=1)
        for seconds in measurement.seconds:
            record.update(seconds)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of all groups, and the same as JSON."""
    groups = config.stash[_GROUPS]
    if not groups:
        return
    terminalreporter.section("time and peak memory, members of a group timed alternately")
    entries = [harness.group_as_dict(group) for group in groups]
    for line in harness.table(entries):
        terminalreporter.write_line(line)
    path = config.getoption("results")
    command = shlex.join(["pytest", *config.invocation_params.args])
    harness.write_json(path, harness.results(entries, harness.default_device(), command=command))
    terminalreporter.write_line("")
    terminalreporter.write_line(f"written to {path}; a picture of it: {Path(sys.executable).name} bench/plot.py {path}")
