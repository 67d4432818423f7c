"""What `import star_kernels` costs: torch and nothing else, and little time beyond it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

# Runs in a fresh interpreter, after `import torch`.
MEASURE = """
import json, sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import star_kernels
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def measure() -> dict:
    run = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def test_import_takes_torch_alone_and_little_time():
    runs = [measure() for _ in range(3)]
    packages = {name.partition(".")[0] for run in runs for name in run["modules"]}
    assert packages - set(sys.stdlib_module_names) == {"star_kernels"}
    assert statistics.median(run["seconds"] for run in runs) <= 0.3
