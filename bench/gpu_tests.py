"""The part of `bench/gpu.py` that runs the tests of the operators' Triton kernels, on a GPU with the shipped table."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench import harness
from bench.gpu_report import Report

# Those of Triton, by their name or their file's.
FILES = ("tests/*/test_*_triton.py", "tests/attention/test_attention_mass.py")
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not exhaustive", "-k", "triton"]
PYTEST += ["--color=no"]
TOY = "tests/allocation/test_allocation_map_triton.py::test_a_great_sharpness_leaves_the_peak"


def run(report: Report) -> None:
    """Each test once, in several processes, as most of the time goes into compiling."""
    if importlib.util.find_spec("pytest") is None:
        report.leave_out("the tests", "pytest is not installed")
        return
    files = sorted(str(path.relative_to(harness.ROOT)) for pattern in FILES for path in harness.ROOT.glob(pattern))
    collect = [*PYTEST, "-q", "--collect-only", *([TOY] if report.toy else files)]
    listed = subprocess.run(collect, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    names = [line for line in listed.splitlines() if "::" in line]
    count = min(8, os.cpu_count() or 1, len(names))
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(i) for i in range(count)]
        commands = [[*PYTEST, "-v", "--tb=short", *names[i::count]] for i in range(count)]
        harness.run_apart(commands, report.deadline - time.monotonic(), logs)
        texts = [path.read_text() for path in logs]
    outcomes = dict(re.findall(r"^(\S+::.*?) (PASSED|SKIPPED|FAILED|ERROR)\b", "\n".join(texts), re.MULTILINE))
    for file in sorted({name.partition("::")[0] for name in names}):
        found = Counter(outcomes.get(name, "not run") for name in names if name.startswith(file))
        bad = found.keys() - {"PASSED", "SKIPPED"}
        report.hold(
            file, found["PASSED"] > 0 and not bad, ", ".join(f"{n} {what.lower()}" for what, n in found.items())
        )
    for text in texts:
        if details := re.search(r"^=+ (FAILURES|ERRORS) =.*", text, re.MULTILINE | re.DOTALL):
            report.fail("tests", "pytest says how", details[0])
