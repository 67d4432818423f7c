"""Host time per call on a GPU (bench/host_time.py), for the installed Triton and the oldest supported one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness import ROOT

OLDEST_TRITON = Path(sys.prefix) / "triton-3.6"  # where `make test-all` puts it


@pytest.mark.parametrize("folder", [None, OLDEST_TRITON], ids=["installed Triton", "oldest Triton"])
def test_host_time(folder: Path | None, capsys: pytest.CaptureFixture[str]) -> None:
    if folder is not None and not folder.exists():
        pytest.skip(f"{folder} is not there; make test-all installs it")
    path = os.pathsep.join(str(part) for part in (folder, ROOT, ROOT / "python") if part)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.host_time"]
    run = subprocess.run(command, cwd=ROOT, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with capsys.disabled():
        print(f"\n{run.stdout}")
