"""Correctness, speed and memory on a GPU in one command: `python bench/gpu.py`.

Needs torch, triton and numpy, and nothing installed from this repository. The operators' tests also need pytest, and
the model diffusers and peft; what is left out for want of them is said. Before the measuring begins everything runs
once, in several processes, so that what there is to compile is compiled. Each part then runs in a process of its own
with its share of the time, so that one that fails, hangs or takes the GPU down leaves the others to run. What was found
goes to the terminal as it comes, and at the end to a table and to bench/results/<device>_<date>.json. The exit code is
0 if everything ran, in time, and every check holds.

`--toy` runs everything at toy size, on the CPU too, where Triton's interpreter takes the place of a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "python")]

from bench import harness
from bench.gpu_report import Rehearsal, Report

# The parts of a section, and the share of the time that each gets of what those before it have left over.
SECTIONS = {
    "operators": {"attention correctness": 1.2, "attention speed": 1.4, "latents": 1.0},
    "tests": {"tests": 1.8},
    "model": {"model": 1.8},
}
FUNCTIONS = {
    "attention correctness": "gpu_attention.correctness",
    "attention speed": "gpu_attention.speed",
    "latents": "gpu_latents.run",
    "tests": "gpu_tests.run",
    "model": "gpu_model.run",
}
REHEARSAL = 0.25  # of the time, at most
GRACE = 20.0  # seconds after its deadline that a part may take to end what it is at


def run_part(part: str, options: argparse.Namespace, path: Path, seconds: float) -> None:
    """Run a part in this process; its findings are in `path`, also after an exception."""
    device, deadline = harness.default_device(), time.monotonic() + seconds
    arguments = (part, path, device, options.toy, options.backend, deadline)
    report = Rehearsal(*arguments, share=options.rehearse) if options.rehearse else Report(*arguments)
    try:
        module, _, function = FUNCTIONS[part].partition(".")
        getattr(importlib.import_module(f"bench.{module}"), function)(report)
    except Exception as error:
        report.fail("the whole part", f"{type(error).__name__}: {error}", traceback.format_exc())
    report.finish()


def rehearse(parts: Sequence[str], options: argparse.Namespace, seconds: float) -> None:
    """Compile what the parts will launch: each runs once, a share of it in each of several processes."""
    count = min(8, os.cpu_count() or 1)
    commands = [
        [*command(parts, options, options.out, seconds), "--rehearse", str(i), str(count)] for i in range(count)
    ]
    harness.run_apart(commands, seconds)


def command(parts: Sequence[str], options: argparse.Namespace, path: Path, seconds: float) -> list[str]:
    """This script on some parts in a process of their own."""
    arguments = [sys.executable, str(Path(__file__).resolve()), "--backend", options.backend, "--out", str(path)]
    return [*arguments, *(["--toy"] if options.toy else []), "--until", str(time.time() + seconds), "--parts", *parts]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts of the sections and put their findings together."""
    device, started = harness.default_device(), time.monotonic()
    content = harness.results([], device, command=shlex.join(["python", "bench/gpu.py", *options.arguments]))
    content |= {"toy": options.toy, "backend": options.backend, "parts": {}}
    print(f"{content['environment']}", flush=True)
    shares = {part: share for section in options.sections for part, share in SECTIONS[section].items()}
    compiling = [part for part in shares if part != "tests"]
    if compiling and not options.in_process:
        rehearse(compiling, options, REHEARSAL * options.budget)
    content["seconds_of_rehearsal"] = round(time.monotonic() - started, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        while shares:
            seconds = options.budget - (time.monotonic() - started)
            part, share = next(iter(shares.items()))
            seconds *= share / sum(shares.values())
            del shares[part]
            print(f"== {part}, {max(seconds, 0):.0f} s", flush=True)
            path.unlink(missing_ok=True)
            if options.in_process:
                run_part(part, options, path, seconds)
            elif seconds > 0:
                harness.run_apart([command([part], options, path, seconds)], seconds + GRACE)
            found = harness.read_json(path) if path.exists() else {"status": "cut off" if seconds > 0 else "no time"}
            content["groups"] += found.pop("groups", [])
            content["parts"][part] = found
            harness.write_json(options.out, content)
    return content


def summary(content: dict[str, Any]) -> list[str]:
    """The closing lines: how each part ended, and everything that is not as it should be."""
    lines = []
    for name, part in content["parts"].items():
        checks = part.get("checks", [])
        kept = sum(check["ok"] for check in checks)
        lines.append(f"{name}: {part['status']}, {kept} of {len(checks)} checks hold, {part.get('seconds', 0)} s")
        lines += [f"  NOT SO: {check['what']}: {check['claim']}" for check in checks if not check["ok"]]
        lines += [f"  NO TIME: {what}" for what in part.get("no_time", [])]
        lines += [f"  left out: {entry['what']}: {entry['reason']}" for entry in part.get("left_out", [])]
        for failure in part.get("failures", []):
            lines += [f"  FAILED: {failure['what']}", *(f"    {line}" for line in failure["traceback"].splitlines())]
    return lines


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=460.0, metavar="SECONDS", help="for everything (default: 460)")
    parser.add_argument("--out", type=Path, help="JSON to write (default: bench/results/<device>_<date>.json)")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU too")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--backend", default="triton", help="of the library's operators (default: triton)")
    parser.add_argument("--in-process", action="store_true", help="no processes and no rehearsal, as for a debugger")
    # Of the processes that this one starts.
    parser.add_argument("--parts", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = list(arguments)
    if harness.default_device().type == "cpu" and not options.toy:
        parser.error("PyTorch finds no GPU here; --toy runs everything at toy size on the CPU")
    options.out = options.out or harness.results_path(harness.default_device())
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if harness.default_device().type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for part in options.parts or ():
        run_part(part, options, options.out, options.until - time.time())
    if options.parts:
        return 0
    content = run(options)
    print()
    for line in [*harness.table(content["groups"]), "", *summary(content), "", f"written to {options.out}"]:
        print(line)
    return 0 if all(part["status"] == "ok" for part in content["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
