"""The package as it is installed: what importing it loads, what it registers, how it is built."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import star_kernels as sk

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def extension():
    assert sk.available_backends()["cpu"] is None, sk.available_backends()["cpu"]
    return importlib.import_module("star_kernels._C")


def test_importing_the_library_loads_torch_and_nothing_else_of_weight():
    code = (
        "import sys, json, torch; before = set(sys.modules); import star_kernels;"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "star_kernels" in loaded
    assert not loaded & {"triton", "diffusers", "transformers", "peft", "accelerate", "star_trainer", "numpy", "scipy"}


def test_the_library_works_where_the_extension_is_missing():
    code = (
        "import sys; sys.modules['star_kernels._C'] = None\n"
        "import torch, star_kernels as sk\n"
        "assert 'not built' in sk.available_backends()['cpu'], sk.available_backends()\n"
        "assert sk.allocation_map(torch.ones(1, 4, 2), (2, 2)).eq(1).all()\n"
        "try: sk.allocation_map(torch.ones(1, 4, 2), (2, 2), backend='cpu')\n"
        "except RuntimeError as error: print(error)"
    )
    done = run_python(code, STAR_KERNELS_BACKEND="")
    assert done.returncode == 0, done.stderr
    assert "backend='cpu' cannot run allocation_map" in done.stdout and "not built" in done.stdout
    assert "allocation_map runs on its reference implementation" in done.stderr


def test_an_extension_built_with_another_torch_is_named_at_import_and_never_loaded(extension, tmp_path):
    package = Path(sk.__file__).parent
    shutil.copytree(package, tmp_path / "star_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    copy = tmp_path / "star_kernels" / Path(extension.__file__).name
    built = f"star_kernels._C was built with torch {extension.build_info()['torch_version']}".encode()
    contents = copy.read_bytes()
    assert contents.count(built) == 1
    copy.write_bytes(contents.replace(built, built.replace(b"torch 2.", b"torch 1.")))
    code = (
        "import sys, torch, star_kernels as sk\n"
        "assert sk.allocation_map(torch.ones(1, 4, 2), (2, 2)).eq(1).all()\n"
        "assert 'star_kernels._C' not in sys.modules and sk.__file__.startswith(sys.argv[1])\n"
        "print(sk.available_backends()['cpu'])"
    ).replace("sys.argv[1]", repr(str(tmp_path)))
    done = run_python(code, tmp_path, PYTHONPATH=str(tmp_path), STAR_KERNELS_BACKEND="")
    assert done.returncode == 0, done.stderr
    minor = ".".join(torch.__version__.split(".")[:2])
    said = rf"was built with torch 1\.\d+ and is not loaded under {re.escape(torch.__version__)}: .* torch {minor},"
    assert re.search(said, done.stdout)
    assert done.stderr.splitlines()[0] == done.stdout.strip()


@pytest.mark.parametrize(
    "name",
    ["allocation_map", "attention_mass", "joint_attention", "policy_loss", "transition_log_prob", "transition_step"],
)
def test_the_extension_registers_its_operators_for_tensors_on_the_cpu(extension, name):
    assert name in dir(torch.ops.star_kernels_cpu) or hasattr(torch.ops.star_kernels_cpu, name)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"star_kernels_cpu::{name}", "CPU")


def test_build_information_matches_the_torch_that_runs(extension):
    info = extension.build_info()
    assert info["torch_version"] == torch.__version__.split("+")[0]
    assert re.match(r"(gcc|clang) \d+", info["compiler"]) and "-O3" in info["flags"] and info["cpp_standard"] >= 201703
    assert isinstance(info["openmp"], bool)


def test_cpu_capability_agrees_with_what_the_operating_system_reports(extension):
    capability = extension.cpu_capability()
    assert set(capability) == {"avx2", "avx512", "avx512_bf16", "amx"}
    if capability["amx"] or capability["avx512_bf16"]:
        assert capability["avx512"]
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(re.findall(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M)[0].split()) if cpuinfo.exists() else None
    if flags is not None:
        wanted = {
            "avx2": {"avx2", "fma", "f16c"},
            "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
            "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
            "amx": {"amx_tile", "amx_bf16"},
        }
        assert capability == {name: needed <= flags for name, needed in wanted.items()}


def test_the_environment_says_which_instructions_kernels_use(extension, monkeypatch):
    monkeypatch.delenv("STAR_KERNELS_CPU_CAPABILITY", raising=False)
    names = ["default", "avx2", "avx512", "avx512_bf16"]
    present = ["default", *(name for name in names[1:] if extension.cpu_capability()[name])]
    highest = present[-1]
    cpuinfo = Path("/proc/cpuinfo")
    intel = cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()
    # Products of bf16 pairs are slow on Intel's.
    assert extension.cpu_level() == (min(highest, "avx512", key=names.index) if intel else highest)
    for name in names:
        monkeypatch.setenv("STAR_KERNELS_CPU_CAPABILITY", name)
        assert extension.cpu_level() == min(name, highest, key=names.index)
    monkeypatch.setenv("STAR_KERNELS_CPU_CAPABILITY", "sse")
    with pytest.raises(ValueError, match="^STAR_KERNELS_CPU_CAPABILITY: expected one of"):
        extension.cpu_level()


def test_the_version_is_that_of_the_installed_package():
    # A wheel that is handed on also names its PyTorch: 0.1.0+torch2.13.
    assert importlib.metadata.version("star-kernels").partition("+")[0] == sk.__version__


def test_the_library_requires_torch_and_triton_only():
    required = importlib.metadata.requires("star-kernels") or []
    core = {re.split(r"[^\w-]", line)[0] for line in required if "extra ==" not in line}
    assert core == {"torch", "triton"}
    assert {"train", "ocr", "bench", "dev"} <= set(
        importlib.metadata.metadata("star-kernels").get_all("Provides-Extra") or []
    )


def test_the_command_line_is_installed():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="star-train")
    assert entry.value == "star_trainer.cli:main"
