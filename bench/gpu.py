"""Correctness, speed and memory on a GPU in one command: `python bench/gpu.py`.

Needs torch, triton and numpy, and nothing installed from this repository; the section at model size also needs
diffusers (and peft for its update steps) and says when it is left out. Each section runs in a process of its own with
its share of the time, so that one that fails, hangs or takes the GPU down leaves the others to run. What was found goes
to the terminal as it comes, and at the end to a table and to bench/results/<device>_<date>.json.

`--toy` runs everything at toy size, on the CPU too, where Triton's interpreter takes the place of a GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "python")]

from bench import harness
from bench.gpu_report import Report

# The share of the time that a section gets of what the sections before it have left over.
SHARES = {"attention correctness": 1.4, "attention speed": 1.4, "latents": 1.2, "model": 1.6}
GRACE = 20.0  # seconds after its deadline that a section may take to end what it is at


def section(name: str) -> Callable[[Report], None]:
    """The function of a section. Imported when it is wanted: what cannot be imported fails its own section only."""
    from bench import gpu_attention, gpu_latents, gpu_model

    sections: dict[str, Callable[[Report], None]] = {
        "attention correctness": gpu_attention.correctness,
        "attention speed": gpu_attention.speed,
        "latents": gpu_latents.run,
        "model": gpu_model.run,
    }
    return sections[name]


def run_section(name: str, options: argparse.Namespace, path: Path, seconds: float) -> None:
    """Run a section in this process; its findings are in `path`, also after an exception."""
    device = harness.default_device()
    deadline = time.monotonic() + seconds
    report = Report(name, path, device, toy=options.toy, backend=options.backend, deadline=deadline)
    report.guard("the whole section", lambda: section(name)(report))
    report.finish()


def run_section_apart(name: str, options: argparse.Namespace, path: Path, seconds: float) -> None:
    """Run a section in a process of its own, and end it when it is long over its time."""
    command = [sys.executable, str(Path(__file__).resolve()), "--sections", name, "--backend", options.backend]
    command += ["--part-until", str(time.time() + seconds), "--out", str(path)]
    run_apart(command + (["--toy"] if options.toy else []), seconds + GRACE)


def run_apart(command: Sequence[str], seconds: float) -> None:
    """Run a command, and kill it after so many seconds; says how it ended if not well."""
    try:
        code = subprocess.run(command, timeout=seconds, cwd=harness.ROOT, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"killed after {seconds:.0f} s", flush=True)
        return
    if code:
        print(f"ended with code {code}", flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sections and put their findings together."""
    device = harness.default_device()
    started = time.monotonic()
    execute = run_section if options.in_process else run_section_apart
    content = harness.results([], device, command=shlex.join(["python", "bench/gpu.py", *options.arguments]))
    content |= {"toy": options.toy, "backend": options.backend, "sections": {}}
    print(f"{content['environment']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "section.json"
        for i, name in enumerate(options.sections):
            left = options.budget - (time.monotonic() - started)
            seconds = left * SHARES[name] / sum(SHARES[other] for other in options.sections[i:])
            print(f"== {name}, {max(seconds, 0):.0f} s", flush=True)
            path.unlink(missing_ok=True)
            if seconds > 0:
                execute(name, options, path, seconds)
            part = harness.read_json(path) if path.exists() else {"status": "failed" if seconds > 0 else "left out"}
            content["groups"] += part.pop("groups", [])
            content["sections"][name] = part
            harness.write_json(options.out, content)
    return content


def summary(content: dict[str, Any]) -> list[str]:
    """The closing lines: how each section ended, and everything that is not as it should be."""
    lines = []
    for name, part in content["sections"].items():
        checks = part.get("checks", [])
        kept = sum(check["ok"] for check in checks)
        lines.append(f"{name}: {part['status']}, {kept} of {len(checks)} checks hold, {part.get('seconds', 0)} s")
        lines += [f"  NOT SO: {check['what']}: {check['error']}" for check in checks if not check["ok"]]
        lines += [f"  left out: {entry['what']}: {entry['reason']}" for entry in part.get("left_out", [])]
        for failure in part.get("failures", []):
            lines += [f"  FAILED: {failure['what']}", *(f"    {line}" for line in failure["traceback"].splitlines())]
    return lines


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=460.0, metavar="SECONDS", help="for everything (default: 460)")
    parser.add_argument("--out", type=Path, help="JSON to write (default: bench/results/<device>_<date>.json)")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU too")
    parser.add_argument("--sections", nargs="+", choices=SHARES, default=list(SHARES), help="default: all")
    parser.add_argument("--backend", default="triton", help="of the fused members (default: triton)")
    parser.add_argument("--in-process", action="store_true", help="no process per section, as for a debugger")
    parser.add_argument("--part-until", type=float, help=argparse.SUPPRESS)
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
    if options.part_until is not None:
        run_section(options.sections[0], options, options.out, options.part_until - time.time())
        return 0
    content = run(options)
    print()
    for line in [*harness.table(content["groups"]), "", *summary(content), "", f"written to {options.out}"]:
        print(line)
    return 0 if all(part["status"] == "ok" for part in content["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
