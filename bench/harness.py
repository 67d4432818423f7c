"""What every benchmark shares: the measuring of `star_trainer.timing`, a table of it, and the results as JSON."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from star_trainer.studies.timing import (
    BUDGET,
    MAX_ROUNDS,
    MIN_ROUNDS,
    Clock,
    CpuClock,
    CudaClock,
    Group,
    Measurement,
    Member,
    Sample,
    Spread,
    clock_for,
    default_device,
    device_name,
    environment,
    format_bytes,
    format_seconds,
    measure,
    spread,
)

__all__ = [
    "BUDGET",
    "MAX_ROUNDS",
    "MIN_ROUNDS",
    "Clock",
    "CpuClock",
    "CudaClock",
    "Group",
    "Measurement",
    "Member",
    "Sample",
    "Spread",
    "clock_for",
    "default_device",
    "device_name",
    "environment",
    "format_bytes",
    "format_seconds",
    "group_as_dict",
    "load_results",
    "measure",
    "read_json",
    "results",
    "results_path",
    "run_apart",
    "spread",
    "table",
    "write_json",
]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FORMAT = 1


def table(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Groups as `group_as_dict` makes them, as lines: median time, ratio with quartiles and interval, memory, rates.

    Last the time of the host, where it is not the device, and whether that may have waited for it.
    """
    width = max((len(member["name"]) for group in groups for member in group["members"]), default=0)
    width += len(" (baseline)")
    head = f"{'':<{width + 2}} {'median':>10}  {'time / baseline':<22}  {'median within':<16}"
    lines = [f"{head} {'faster':>8} {'peak memory':>12}"]
    for group in groups:
        lines.append(group["name"])
        for member in group["members"]:
            label = member["name"] + (" (baseline)" if member["name"] == group["baseline"] else "")
            line = f"  {label:<{width}} {format_seconds(member['seconds']['median']):>10}"
            ratio = member["ratio"]
            if ratio is None:
                line += " " * 51
            else:
                relative = f"{ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]"
                interval = f"[{ratio['low']:.3f}, {ratio['high']:.3f}]"
                line += f"  {relative:<22}  {interval:<16} {1 / ratio['median']:>7.2f}x"
            rates = "".join(f"  {value:.3g} {unit}" for unit, value in member["rates"].items())
            host = member.get("host_seconds")
            if host is not None:
                rates += f"  host {format_seconds(host)}" + ("" if member["ahead"] > 0.5 else ", not ahead")
            lines.append(f"{line} {format_bytes(member['peak_bytes']):>12}{rates}")
    return lines


def results_path(device: torch.device, date: datetime.date | None = None) -> Path:
    """Where results that are kept go: named by device and date."""
    name = "".join(c if c.isalnum() else "_" for c in device_name(device).lower())
    while "__" in name:
        name = name.replace("__", "_")
    return RESULTS / f"{name.strip('_')}_{date or datetime.date.today()}.json"


def results(groups: Sequence[dict[str, Any]], device: torch.device, *, command: str) -> dict[str, Any]:
    """What is written as JSON, of groups as `group_as_dict` makes them; `load_results` checks the same fields."""
    return {
        "format": FORMAT,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(device),
        "groups": list(groups),
    }


def group_as_dict(group: Group) -> dict[str, Any]:
    """A group as JSON has it. Times in seconds, memory in bytes, ratios are time / time of the baseline."""
    members = []
    for measurement in group.measurements:
        ratio = group.ratio(measurement.name)
        members.append(
            {
                "name": measurement.name,
                "rounds": len(measurement.seconds),
                "seconds": vars(spread(measurement.seconds)),
                "ratio": None if ratio is None else vars(ratio),
                "peak_bytes": measurement.peak_bytes,
                "rates": measurement.rates,
                "host_seconds": measurement.host_seconds,
                "ahead": measurement.ahead,
            }
        )
    return {"name": group.name, "baseline": group.baseline, "members": members}


def run_apart(commands: Sequence[Sequence[str]], seconds: float, logs: Sequence[Path] = ()) -> None:
    """Run commands side by side and kill what is left after so many seconds; says how they ended if not well.

    With `logs` what each prints goes to a file of its own.
    """
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("w")) for path in logs] if logs else [None] * len(commands)
        processes = [
            subprocess.Popen(command, cwd=ROOT, stdout=file, start_new_session=True)
            for command, file in zip(commands, files, strict=True)
        ]
    try:
        for process in processes:
            if code := process.wait(max(0.0, deadline - time.monotonic())):
                print(f"ended with code {code}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"killed after {seconds:.0f} s", flush=True)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started itself
                process.wait()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all, so that a run that is killed leaves the last state that it wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote.

    Raises:
        ValueError: not a JSON file, with the reason.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a JSON file, got {error}") from error


def load_results(path: Path) -> dict[str, Any]:
    """Read what `results` made.

    Raises:
        ValueError: not such a file; the message says what is missing.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected results in format {FORMAT}")
    for group in _field(path, content, "groups", list):
        baseline = group.get("baseline")
        names = []
        for member in _field(path, group, "members", list):
            names.append(_field(path, member, "name", str))
            spreads = [_field(path, member, "seconds", dict)]
            if baseline is not None:
                spreads.append(_field(path, member, "ratio", dict))
            for values in spreads:
                for key in ("median", "q1", "q3"):
                    _field(path, values, key, (int, float))
            _field(path, member, "peak_bytes", int)
        if baseline is not None and baseline not in names:
            raise ValueError(f"{path}: group {group.get('name')!r} has no member {baseline!r}, its baseline")
    return content


def _field(path: Path, entry: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        raise ValueError(f"{path}: expected an entry with {key!r}, got {entry!r}"[:300])
    return entry[key]
