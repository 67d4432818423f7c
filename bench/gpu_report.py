"""What a part of `bench/gpu.py` writes its findings to: checks, groups, figures, and what was left out and why."""

from __future__ import annotations

import math
import time
import traceback
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import harness
from bench.harness import Group, Member

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Report:
    """Findings of one part. Every entry goes to disk at once: a part that is killed leaves what it had."""

    name: str
    path: Path
    device: torch.device
    toy: bool
    backend: str
    deadline: float  # on time.monotonic
    started: float = field(default_factory=time.monotonic)
    groups: list[Group] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)  # what this machine does not have
    no_time: list[str] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.clock = harness.clock_for(self.device)
        self._write()

    def say(self, line: str) -> None:
        """A line of progress on the terminal."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {self.name}: {line}", flush=True)

    def check(self, what: str, error: float, limit: float) -> None:
        """Hold an error against its limit. NaN is over every limit."""
        self.hold(what, error <= limit, f"{error:.2e} <= {limit:.2e}", error=None if math.isnan(error) else error)

    def check_equal(self, what: str, first: torch.Tensor, second: torch.Tensor) -> None:
        """Whether two tensors are the same bit for bit."""
        self.hold(what, torch.equal(first, second), "bit for bit")

    def hold(self, what: str, ok: bool, shown: str, error: float | None = None) -> None:
        """A check: whether it is so, and the claim in words."""
        self.checks.append({"what": what, "claim": shown, "error": error, "ok": ok})
        self.say(f"{what}: {shown}: {'ok' if ok else 'NOT SO'}")
        self._write()

    def figure(self, name: str, value: float) -> None:
        """A number that belongs to no group."""
        self.figures[name] = value
        self.say(f"{name}: {value:.4g}")
        self._write()

    def leave_out(self, what: str, reason: object) -> None:
        """Something that this machine does not have."""
        self.left_out.append({"what": what, "reason": _first_line(reason)})
        self.say(f"{what} left out: {_first_line(reason)}")
        self._write()

    def available(self, what: str, calls: Mapping[str, F], *arguments: object) -> dict[str, F]:
        """Those of other people's functions that run here on these arguments."""
        found = {}
        for name, call in calls.items():
            try:
                call(*arguments)
            except Exception as error:
                self.leave_out(f"{what}: {name}", error)
            else:
                found[name] = call
        return found

    def guard(self, what: str, function: Callable[[], object]) -> bool:
        """Run `function`, if there is time, and keep what it raises as a failure."""
        if time.monotonic() >= self.deadline:
            self.no_time.append(what)
            self.say(f"{what}: NO TIME")
            self._write()
            return False
        try:
            function()
        except Exception as error:
            self.fail(what, f"{type(error).__name__}: {error}", traceback.format_exc())
            return False
        return True

    def fail(self, what: str, message: str, details: str) -> None:
        self.failures.append({"what": what, "traceback": details})
        self.say(f"{what} FAILED: {_first_line(message)}")
        self._write()

    def measure(
        self, name: str, members: Sequence[Member], *, budget: float = 2.0, fastest: Collection[str] = ()
    ) -> Group | None:
        """Time the members. The baseline is that of the members, or the fastest of those named in `fastest`."""
        running = [member for member in members if self.guard(f"{name}: {member.name}", member.function)]
        if not running:
            return None
        rounds = {"budget": 0.0, "min_rounds": 1} if self.toy else {"budget": budget}
        group = harness.measure(running, self.clock, name=name, **rounds)  # type: ignore[arg-type]
        candidates = [measurement for measurement in group.measurements if measurement.name in fastest]
        if candidates:
            group = replace(group, baseline=min(candidates, key=lambda m: m.median).name)
        self.groups.append(group)
        for line in harness.table([harness.group_as_dict(group)])[1:]:
            self.say(line)
        self._write()
        return group

    def finish(self) -> None:
        self.finished = True
        self._write()

    @property
    def ok(self) -> bool:
        held = all(check["ok"] for check in self.checks)
        return self.finished and held and not self.failures and not self.no_time

    def _write(self) -> None:
        content = {name: getattr(self, name) for name in ("checks", "figures", "left_out", "no_time", "failures")}
        status = "ok" if self.ok else "failed" if self.finished else "cut off"
        seconds = round(time.monotonic() - self.started, 1)
        groups = [harness.group_as_dict(group) for group in self.groups]
        harness.write_json(self.path, {"status": status, "seconds": seconds, **content, "groups": groups})


@dataclass
class Rehearsal(Report):
    """Runs everything once for what it compiles, which stays on disk, and keeps nothing.

    `share` is (i, n) for the i-th of n processes that divide what is guarded by its names.
    """

    share: Sequence[int] = (0, 1)

    def say(self, line: str) -> None:
        super().say(f"rehearsal: {line}")

    def guard(self, what: str, function: Callable[[], object]) -> bool:
        index, count = self.share
        return zlib.crc32(what.encode()) % count == index and super().guard(what, function)

    def hold(self, what: str, ok: bool, shown: str, error: float | None = None) -> None:
        pass

    def measure(
        self, name: str, members: Sequence[Member], *, budget: float = 0.0, fastest: Collection[str] = ()
    ) -> None:
        for member in members:
            super().guard(member.name, member.function)

    def _write(self) -> None:
        pass


def _first_line(message: object) -> str:
    return (str(message).strip().splitlines() or [repr(message)])[0]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value; NaN where `value` has one."""
    expected = expected.double()
    scale = float(expected.abs().max())
    return float((value.double() - expected).abs().max()) / (scale or 1.0)
