"""What the compilers make of the Triton kernels, for GPUs that are not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bench.roofline import H100, attention_mass, mass_microseconds, mass_shapes
from bench.static_gpu import LIMITS, MEASURED, OPERATORS, KernelReport, calls, capture_pairs, image_loop, load, settings
from star_kernels.attention.table import CONFIGURATIONS

ROOT = Path(__file__).resolve().parents[1]
OLDEST_TRITON = Path(sys.prefix) / "triton-3.6"  # where `make test-all` puts it
pytestmark = pytest.mark.long
Kernel = dict[str, Any]

# Which calls are compiled under the oldest Triton, and for Hopper by `make test`, as compiling all takes minutes:
# attention at the head dimension of Stable Diffusion 3.5, and for Hopper and AMD every other kernel once, in the
# variant with the most code; the other NVIDIA architectures have Hopper's compiler. With that folder in PYTHONPATH,
# ``python -m bench.static_gpu`` compiles all.
_EVERY_KERNEL = "^(?!.*(float32| float16|head dim (32|128|256)|channels last|^mean$|position, bf16|dppo))"
REPRESENTATIVE = {
    "sm_80": "forward, bfloat16, head dim 64",
    "sm_90": _EVERY_KERNEL,
    "sm_100": "forward, bfloat16, head dim 64",
    "gfx942": _EVERY_KERNEL,
}


def python(*arguments: str, cache: Path, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python from the root of the repository, without Triton's interpreter, with a compilation cache in `cache`.

    Modules are looked for in `first`, then in the repository, then where they are installed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(str(folder) for folder in (first, ROOT, ROOT / "python") if folder)
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("architecture", ["sm_90", pytest.param("gfx942", marks=pytest.mark.exhaustive)])
def test_the_report_sees_spills_and_loops(architecture: str, triton_cache: Path) -> None:
    run = python("tests/known_kernels.py", architecture, cache=triton_cache)
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


@pytest.mark.parametrize("architecture", LIMITS)
def test_every_row_of_the_attention_table_is_compiled_for_every_use(architecture: str) -> None:
    tiles = {
        call.name: (call.arguments["BLOCK_M"], call.arguments["BLOCK_N"], call.options["num_warps"])
        for _, call in calls(["attention"], architecture)
        if "BLOCK_N" in call.arguments
    }
    for (itemsize, head_dim), row in CONFIGURATIONS[architecture].items():
        tensors = f"{'float32' if itemsize == 4 else 'bfloat16'}, head dim {head_dim}"
        for use in ("no capture", "8 units", "8 units, text lengths"):
            assert tiles.pop(f"forward, {tensors}, {use}") == (row.block_m, row.block_n, row.num_warps)
    kinds = [f"{dtype}, head dim {dim}" for dtype in ("bfloat16", "float32") for dim in (32, 64, 128, 256)]
    assert tiles.keys() == {f"forward, float16, head dim 64, {use}" for use in ("no capture", "8 units")} | {
        f"mass from log-sum-exp, {direction}, {kind}, {units} units"
        for kind in (*kinds, "float16, head dim 64")
        for direction, units in (("image to text", 8), ("image to text", 17), ("text to image", 8))
    }


# sm_80 has Hopper's compiler; its attention at head dimension 64 is compiled below, under the oldest Triton.
@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", [name for name in LIMITS if name != "sm_80"])
def test_the_kernels_are_what_their_tables_promise(architecture: str, tmp_path: Path, triton_cache: Path) -> None:
    wanted = to_compile(architecture)
    names = f"^({'|'.join(re.escape(name) for _, name in wanted)})$"
    reports = compile_all(architecture, tmp_path / "report.json", triton_cache, names)
    assert {(r.operator, r.name): r.settings for r in reports} == wanted
    assert len(capture_pairs(reports)) == len([name for _, name in wanted if re.match("forward, .* units$", name)])
    assert not complaints(reports)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_a_row_that_is_not_hoppers_is_compiled(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = to_compile(architecture)
    of_published_models = "forward, bfloat16, head dim (64|128), 8 units$"
    assert {name for _, name in before if re.match(of_published_models, name)} == {
        name for _, name in listed(architecture) if re.match(of_published_models, name)
    }
    row = CONFIGURATIONS[architecture][4, 64]
    monkeypatch.setitem(CONFIGURATIONS[architecture], (4, 64), replace(row, block_m=2 * row.block_m))
    more = to_compile(architecture).keys() - before.keys()
    assert {"forward, float32, head dim 64, no capture", "forward, float32, head dim 64, 8 units"} <= {
        name for _, name in more
    }


under_the_oldest_triton = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not OLDEST_TRITON.exists(), reason=f"{OLDEST_TRITON} is not there; make test-all installs it"),
]


@pytest.mark.parametrize(
    ("architecture", "triton"),
    [
        pytest.param("sm_90", None, id="sm_90"),
        *(
            pytest.param(name, OLDEST_TRITON, id=f"{name}-oldest-triton", marks=under_the_oldest_triton)
            for name in LIMITS
        ),
    ],
)
def test_every_kernel_is_what_its_table_promises(
    architecture: str, triton: Path | None, tmp_path: Path, triton_cache: Path
) -> None:
    names = REPRESENTATIVE[architecture]
    reports = compile_all(architecture, tmp_path / "report.json", triton_cache, names, triton)
    compiled = {report.kernel for report in reports}
    if architecture in ("sm_90", "gfx942"):
        assert compiled == {call.kernel.__name__ for _, call in calls(OPERATORS, architecture)}
        assert {"max, sharpened, smoothed, clamped", "position, fp32, C 32, guidance and mask"} <= {
            report.name for report in reports
        }
    else:
        assert len(reports) == 3 and len(compiled) == 1
    assert len(capture_pairs(reports)) == 1
    # The oldest one needs more instructions for the same kernel.
    assert not complaints(reports, taking_turns=2.0 if triton is None else 2.2)


def listed(architecture: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The settings of every call that the operators list, by operator and name, as JSON has them."""
    return {
        (operator, call.name): json.loads(json.dumps(settings(call)))
        for operator, call in calls(OPERATORS, architecture)
    }


def to_compile(architecture: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Those of `listed` that are to be compiled here.

    For sm_90 all but head dimension 32, some of the mass beside other attention and float32 at some head dimensions,
    for AMD every kernel once. The other NVIDIA architectures have Hopper's compiler: attention in bfloat16 at the head
    dimensions of published models, and what has settings of its own. ``python -m bench.static_gpu`` compiles all.
    """
    left_out = "head dim 32|mass.*(17 units|head dim 256| float16)|float32, head dim 128"
    entries = {key: chosen for key, chosen in listed(architecture).items() if not re.search(left_out, key[1])}
    if architecture == "sm_90":
        return entries
    if architecture == "gfx942":
        return {key: chosen for key, chosen in entries.items() if re.search(_EVERY_KERNEL, key[1])}
    hopper = listed("sm_90")
    return {
        (operator, name): chosen
        for (operator, name), chosen in entries.items()
        if re.search("(forward|mass).*bfloat16, head dim (64|128), (no capture|8 units)$", name)
        or chosen != hopper[operator, name]
    }


def compile_all(
    architecture: str, file: Path, cache: Path, names: str, triton: Path | None = None
) -> list[KernelReport]:
    """The reports of the calls that match `names`, compiled for `architecture` by a Triton that may lie elsewhere."""
    arguments = ("--architecture", architecture, "--call", names, "--json", str(file))
    run = python("-m", "bench.static_gpu", *arguments, cache=cache, first=triton)
    assert file.exists(), run.stderr
    version = json.loads(file.read_text())["triton"]
    assert triton is None or version.startswith("3.6."), version
    return load(file)


def complaints(reports: list[KernelReport], taking_turns: float = 2.0) -> list[str]:
    """Where the machine code is not what the kernels were written for."""
    found = [f"{report.name} spills registers" for report in reports if report.spills]
    for report in reports:
        loops = [loop for loop in report.loops if loop.tensor]
        if report.operator == "attention" and "float16" in report.name and not loops:
            found.append(f"{report.name} has no tensor-core instruction in a loop")
        if report.architecture == "sm_90":
            for loop in loops:
                if not all(opcode.startswith("HGMMA") for opcode in loop.tensor):
                    found.append(f"{report.name}, {loop.name}: {loop.tensor} is not wgmma")
                if not 0 < loop.tensor_groups < sum(loop.tensor.values()):
                    found.append(f"{report.name}, {loop.name}: each wgmma is waited for")
        for shape in mass_shapes(report):
            floor = 1e6 * max(attention_mass(shape).seconds(H100).values())
            if mass_microseconds(report, shape, H100)[0] > 1.5 * floor:
                found.append(
                    f"{report.name}, {shape.name}: more than 1.5 times the floor with all resources side by side"
                )
            if mass_microseconds(report, shape, H100)[1] > taking_turns * floor:
                found.append(f"{report.name}, {shape.name}: more than {taking_turns} times the floor, taking turns")
    for plain, capturing in capture_pairs(reports):
        before, after = image_loop(plain), image_loop(capturing)
        more = {kind for kind in MEASURED if after.kinds.get(kind, 0) > before.kinds.get(kind, 0)}
        if more or after.instructions > 1.02 * before.instructions:
            found.append(f"{capturing.name}: the loop over image keys goes from {before} to {after}")
    return found
