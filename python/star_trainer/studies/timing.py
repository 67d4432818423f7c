"""Timing of calls that are compared: alternating rounds, peak memory, ratios to a baseline, and the machine.

The members of a group are timed in turn, one round after another, in an order that changes from round to round. A ratio
is the median over rounds of (time of the member / time of the baseline in the same round): a machine that slows down
for a while slows both, and a member that is always preceded by the same other one would inherit its caches.

Needs torch alone.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 100
BUDGET = 5.0  # seconds for a group

Function = Callable[[], object]


@dataclass(frozen=True)
class Member:
    """One of the things that a group compares. The baseline is what the others are divided by.

    `work` counts what one call does, by unit, as {"TFLOP": 0.4}: the table then has the rate, TFLOP/s.
    """

    name: str
    function: Function
    baseline: bool = False
    work: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, and an interval that holds the median with 95 % confidence where rounds are alike."""

    median: float
    q1: float
    q3: float
    low: float
    high: float


@dataclass(frozen=True)
class Sample:
    """One reading of a clock: seconds of a call, and where a device computes those that the host takes to launch it.

    `ahead` says whether the host had launched all of it before the device came to it, so that `seconds` are the
    device's alone.
    """

    seconds: float
    host_seconds: float | None = None
    ahead: bool = True


@dataclass(frozen=True)
class Measurement:
    """A reading of one call in each round, and the most memory that it holds beyond what was there before it."""

    name: str
    samples: tuple[Sample, ...]
    peak_bytes: int
    work: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(sample.seconds for sample in self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def host_seconds(self) -> float | None:
        """The median of those of the host; None where the host is the device."""
        found = [sample.host_seconds for sample in self.samples if sample.host_seconds is not None]
        return statistics.median(found) if found else None

    @property
    def ahead(self) -> float:
        """The share of the rounds in which the host ran ahead of the device."""
        return statistics.mean(sample.ahead for sample in self.samples)

    @property
    def rates(self) -> dict[str, float]:
        """Work per second by unit, from the median."""
        return {f"{unit}/s": amount / self.median for unit, amount in self.work.items()}


@dataclass(frozen=True)
class Group:
    """Measurements that were taken in turn, so that round i of one belongs to round i of another."""

    name: str
    measurements: tuple[Measurement, ...]
    baseline: str | None = None

    def ratio(self, name: str, to: str | None = None) -> Spread | None:
        """Time of a member relative to another one, by default the baseline, round by round; None without baseline."""
        to = self.baseline if to is None else to
        if to is None:
            return None
        base, member = self[to].seconds, self[name].seconds
        return spread([a / b for a, b in zip(member, base, strict=True)])

    def __getitem__(self, name: str) -> Measurement:
        return next(measurement for measurement in self.measurements if measurement.name == name)


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value. The interval is that of the sign test; fewer than six values give it less confidence."""
    if len(values) == 1:
        return Spread(*(values[0],) * 5)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    ordered, count = sorted(values), len(values)
    # Half of the values lie below the median, give or take sqrt(count) / 2 as a standard deviation.
    cut = max(0, int((count - 1.96 * math.sqrt(count) - 1) / 2))
    return Spread(median, q1, q3, ordered[cut], ordered[-1 - cut])


class Clock(Protocol):
    """How a device is timed and its memory counted."""

    shortest_round: float  # seconds that a round should last at least, by repeating the call

    def sample(self, function: Function, calls: int, host_seconds: float = 0.0) -> Sample:
        """A reading of one call, the mean of `calls` of them, whose launches are expected to take `host_seconds`."""

    def peak_bytes(self, function: Function) -> int:
        """The most bytes that one call holds at a time, results included, arguments not."""


class CpuClock:
    """Wall-clock time, and the peak of PyTorch's CPU allocator, which is exact where resident memory is not.

    Scratch that a kernel takes from the C library instead of PyTorch is not in it.
    """

    shortest_round = 1e-2

    def sample(self, function: Function, calls: int, host_seconds: float = 0.0) -> Sample:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return Sample((time.perf_counter() - start) / calls)

    def peak_bytes(self, function: Function) -> int:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            kept = function()
        del kept
        held = most = 0
        assert profile.kineto_results is not None
        for event in profile.kineto_results.events():
            if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
                held += event.nbytes()
                most = max(most, held)
        return most


class CudaClock:
    """The device's time for a call, between CUDA events, the host's for launching it, and the caching allocator's peak.

    The L2 cache is overwritten before a call. Then the device spins for longer than the host is expected to need, so
    that all of the call is queued when the device comes to it. Whether it was, the first event tells: the host is done
    with the last launch before the device has reached it. That cannot be for a call that waits for the device, or that
    launches more than the driver queues (about a thousand kernels): its time is as long as host and device take
    together, and that of the host includes its waiting for room in the queue.
    """

    shortest_round = 0.0
    FLUSH_BYTES = 256 * 2**20  # more than any L2
    MARGIN, LONGEST_SPIN = 2e-4, 0.1  # seconds

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(self.FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._cycles_per_second = 1e9
        self._cycles_per_second = 1e6 / self.sample(lambda: torch.cuda._sleep(1_000_000), 1).seconds

    def sample(self, function: Function, calls: int, host_seconds: float = 0.0) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        spin = min(self.LONGEST_SPIN, 2 * host_seconds * calls + self.MARGIN)
        self._flush.zero_()
        torch.cuda._sleep(int(spin * self._cycles_per_second))
        start.record()
        began = time.perf_counter()
        for _ in range(calls):
            function()
        host_seconds = (time.perf_counter() - began) / calls
        end.record()
        ahead = not start.query()
        end.synchronize()
        return Sample(start.elapsed_time(end) * 1e-3 / calls, host_seconds, ahead)

    def peak_bytes(self, function: Function) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        kept = function()
        torch.cuda.synchronize(self._device)
        most = torch.cuda.max_memory_allocated(self._device) - before
        del kept
        return most


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def measure(
    members: Sequence[Member],
    clock: Clock,
    *,
    name: str,
    budget: float = BUDGET,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
) -> Group:
    """Time `members` alternately for about `budget` seconds, after warming each of them up.

    However long a round takes, there are at least `min_rounds` and at most `max_rounds` of them.

    Raises:
        ValueError: no members, two of one name, or two baselines.
    """
    names = [member.name for member in members]
    baselines = [member.name for member in members if member.baseline]
    if not members or len(set(names)) != len(names) or len(baselines) > 1:
        raise ValueError(f"{name}: expected members with different names and at most one baseline, got {names}")
    with _without_garbage_collection():
        last, peaks, calls = {}, {}, {}
        for member in members:
            clock.sample(member.function, 1)  # compiles
            last[member.name] = estimate = clock.sample(member.function, 1)
            peaks[member.name] = clock.peak_bytes(member.function)
            calls[member.name] = max(1, math.ceil(clock.shortest_round / max(estimate.seconds, 1e-7)))
        # The host's time once for launching, and twice for what goes ahead of that.
        round_seconds = sum((last[key].seconds + 3 * (last[key].host_seconds or 0.0)) * calls[key] for key in names)
        rounds = min(max_rounds, max(min_rounds, int(budget / max(round_seconds, 1e-9))))
        order, shuffle = list(members), random.Random(0)
        samples: dict[str, list[Sample]] = {key: [] for key in names}
        for _ in range(rounds):
            shuffle.shuffle(order)
            for member in order:
                host_seconds = last[member.name].host_seconds or 0.0
                last[member.name] = clock.sample(member.function, calls[member.name], host_seconds)
                samples[member.name].append(last[member.name])
    measurements = tuple(Measurement(m.name, tuple(samples[m.name]), peaks[m.name], m.work) for m in members)
    return Group(name, measurements, baselines[0] if baselines else None)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def format_seconds(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def format_bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the software that the figures belong to."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    described: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["cuda"] = torch.version.cuda
        described["capability"] = f"{properties.major}.{properties.minor}"
        described["memory_bytes"] = properties.total_memory
    return described


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} {os.cpu_count()} threads"
    return f"{platform.machine()} {os.cpu_count()} threads"


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # Installed somewhere inside another repository, it has no commit.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
