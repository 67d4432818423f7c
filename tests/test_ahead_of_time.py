"""What the compilers make of the Triton kernels, for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
Kernel = dict[str, Any]


def python(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run Python from the root of the repository, without Triton's interpreter, with a compilation cache in `cache`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_the_report_sees_spills_and_loops(architecture: str, tmp_path: Path) -> None:
    run = python("tests/known_kernels.py", architecture, cache=tmp_path)
    assert run.returncode == 0, run.stderr
    known: dict[str, Kernel] = {kernel["name"]: kernel for kernel in json.loads(run.stdout)["kernels"]}
    assert known["hungry"]["stack"] > 0
    assert known["hungry"]["spill_instructions"] > 0
    assert known["loop"]["stack"] == known["loop"]["spill_instructions"] == 0

    # 64 x 64 exponentials in the outer loop, one product of 64 x 64 x 64 in the inner one.
    outer, inner = known["loop"]["loops"]
    assert (outer["depth"], inner["depth"]) == (1, 2)
    lanes = 64 if architecture == "gfx942" else 32
    assert outer["kinds"]["special"] == 64 * 64 // (known["loop"]["warps"] * lanes)
    assert "special" not in inner["kinds"]
    if architecture == "sm_90":
        assert inner["tensor"] == {"HGMMA.64x64x16.F32.BF16": 4}
        assert inner["tensor_groups"] == 1
    else:
        assert inner["tensor"].keys() == {"v_mfma_f32_32x32x8_bf16"}
