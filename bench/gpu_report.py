"""What a section of `bench/gpu.py` writes its findings to: checks, groups, figures, and what was left out and why."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.harness import Group, Member


@dataclass
class Report:
    """Findings of one section. Every entry goes to disk at once: a section that is killed leaves what it had."""

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
    left_out: list[dict[str, str]] = field(default_factory=list)
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
        shown = None if math.isnan(error) else error
        entry = {"what": what, "error": shown, "limit": limit, "ok": error <= limit}
        self._check(entry, f"{error:.2e} <= {limit:.2e}")

    def check_equal(self, what: str, first: torch.Tensor, second: torch.Tensor) -> None:
        """Whether two tensors are the same bit for bit."""
        self._check({"what": what, "error": None, "limit": None, "ok": torch.equal(first, second)}, "bit for bit")

    def _check(self, entry: dict[str, Any], shown: str) -> None:
        self.checks.append(entry)
        self.say(f"{entry['what']}: {shown}: {'ok' if entry['ok'] else 'NOT SO'}")
        self._write()

    def figure(self, name: str, value: float) -> None:
        """A number that belongs to no group."""
        self.figures[name] = value
        self.say(f"{name}: {value:.4g}")
        self._write()

    def leave_out(self, what: str, reason: object) -> None:
        """Something that this machine does not have, or that there was no time or memory for."""
        self.left_out.append({"what": what, "reason": _first_line(reason)})
        self.say(f"{what} left out: {_first_line(reason)}")
        self._write()

    def guard(self, what: str, function: Callable[[], object]) -> bool:
        """Run `function` and keep what it raises as a failure, or as left out where memory did not suffice."""
        try:
            function()
        except torch.OutOfMemoryError as error:
            self.leave_out(what, error)
            return False
        except Exception as error:
            self.failures.append({"what": what, "traceback": traceback.format_exc()})
            self.say(f"{what} FAILED: {type(error).__name__}: {_first_line(error)}")
            self._write()
            return False
        return True

    def out_of_time(self, what: str) -> bool:
        """Whether the section's time is used up; says what is then left out."""
        if time.monotonic() < self.deadline:
            return False
        self.leave_out(what, "the section's time was used up")
        return True

    def measure(
        self, name: str, members: Sequence[Member], *, budget: float = 2.0, fastest: str | None = None
    ) -> Group | None:
        """Time the members that run here. `fastest`: the baseline is the fastest of the members that begin so."""
        if self.out_of_time(name):
            return None
        running = [member for member in members if self.guard(f"{name}: {member.name}", member.function)]
        if not running:
            return None
        if self.toy:
            group = harness.measure(running, self.clock, name=name, budget=0.0, min_rounds=1)
        else:
            group = harness.measure(running, self.clock, name=name, budget=budget)
        if fastest is not None:
            candidates = [m for m in group.measurements if m.name.startswith(fastest)]
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
        return self.finished and not self.failures and all(check["ok"] for check in self.checks)

    def _write(self) -> None:
        harness.write_json(
            self.path,
            {
                "status": "ok" if self.ok else "failed" if self.finished else "cut off",
                "seconds": round(time.monotonic() - self.started, 1),
                "checks": self.checks,
                "figures": self.figures,
                "left_out": self.left_out,
                "failures": self.failures,
                "groups": [harness.group_as_dict(group) for group in self.groups],
            },
        )


def _first_line(message: object) -> str:
    return (str(message).strip().splitlines() or [repr(message)])[0]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value; NaN where `value` has one."""
    expected = expected.double()
    scale = float(expected.abs().max())
    return float((value.double() - expected).abs().max()) / (scale or 1.0)
