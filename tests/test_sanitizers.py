"""The C++ operators under AddressSanitizer and UBSan, at awkward shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_cxx_compiler

ROOT = Path(__file__).parents[1]
OPERATORS = Path(__file__).parent / "sanitized_operators.py"
# Without the check of virtual tables: the sources have none, and PyTorch's headers have many.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
# Python brings -fwrapv, under which no signed overflow is an error and the AVX-512 tiles take minutes to compile.
FLAGS = [*SANITIZERS, "-fno-wrapv", "-fno-omit-frame-pointer", "-g1", "-O1"]
pytestmark = pytest.mark.exhaustive

FAULTS = {
    "heap-buffer-overflow": """
        extern "C" float run(const float* numbers, long count) { return numbers[count]; }
    """,
    "signed integer overflow": """
        extern "C" float run(const float*, long count) { return float(0x7ffffff0 + int(count)); }
    """,
}
CALL_FAULT = """
import ctypes, sys
run = ctypes.CDLL(sys.argv[1]).run
numbers = (ctypes.c_float * 1024)()
run(numbers, ctypes.c_long(int(sys.argv[2])))
print("ran all")
"""


def runtime_library(name: str) -> str | None:
    """Where the compiler has a library of that name; it repeats the name where it has none."""
    command = [get_cxx_compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) else None


def run_sanitized(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Python with the sanitizers' runtime in it. With libstdc++ too, or it could not follow exceptions."""
    libraries = [path for name in ("libasan.so", "libstdc++.so") if (path := runtime_library(name)) is not None]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STAR_KERNELS_")}
    environment |= {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",  # CUDA and AddressSanitizer want the same addresses
    }
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module", autouse=True)
def _has_sanitizers() -> None:
    if sys.platform != "linux" or runtime_library("libasan.so") is None:
        pytest.skip(f"{get_cxx_compiler()} has no libasan.so")


@pytest.mark.parametrize(("fault", "count"), [("heap-buffer-overflow", 1024), ("signed integer overflow", 100)])
def test_an_error_is_reported(fault: str, count: int, tmp_path: Path) -> None:
    source, library = tmp_path / "fault.cpp", tmp_path / "fault.so"
    source.write_text(FAULTS[fault])
    subprocess.run([get_cxx_compiler(), "-shared", "-fPIC", *FLAGS, "-o", library, source], check=True)
    result = run_sanitized("-c", CALL_FAULT, library, str(count))
    assert result.returncode != 0 and fault in result.stderr, result.stderr
    assert run_sanitized("-c", CALL_FAULT, library, "1").stdout.endswith("ran all\n")


def copy_to_build(folder: Path) -> None:
    """What `setup.py` builds, with all sources in one that need no instruction set of their own.

    Most of the time goes into PyTorch's headers, which are then compiled once.
    """
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "star_kernels").mkdir()
    shutil.copy(ROOT / "star_kernels" / "__init__.py", folder / "star_kernels")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    together = []
    for source in sorted((folder / "csrc").glob("*.cpp")):
        # Those of one instruction set each stay alone: what they tell the compiler would hold for all that follows.
        if "#pragma GCC target" not in source.read_text() and not source.name.endswith("_default.cpp"):
            together.append(f'#include "{source.rename(source.with_suffix(".inc")).name}"\n')
    (folder / "csrc" / "together.cpp").write_text("".join(together))


@pytest.mark.long
def test_no_operator_reads_or_writes_out_of_bounds_or_is_undefined(tmp_path: Path) -> None:
    processes = len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    environment = {
        **os.environ,
        "STAR_KERNELS_CXXFLAGS": " ".join(FLAGS),
        "LDFLAGS": " ".join(SANITIZERS),
        "STAR_KERNELS_BUILD_CPU": "1",
        "MAX_JOBS": str(max(1, processes)),
    }
    copy_to_build(tmp_path)
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", "built"]
    built = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (extension,) = tmp_path.glob("built/star_kernels/_C*.so")
    result = run_sanitized(OPERATORS, extension)
    assert result.returncode == 0 and result.stdout.endswith("ran all\n"), result.stdout + result.stderr
