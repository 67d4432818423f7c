"""Build of the C++ extension and the list of packages; everything else stands in pyproject.toml.

Needs torch in the environment that builds (``pip install --no-build-isolation``), so that the extension is compiled
against the PyTorch it will run with; an sdist does not. ``STAR_KERNELS_BUILD_CPU=0`` leaves the extension out; torch is
then not needed. ``STAR_KERNELS_NAME_TORCH=1`` names the torch in the version (0.1.0+torch2.13): for wheels that are
handed on. pip refuses it in what it builds from an index, where the version has to be that of the sdist.
``STAR_KERNELS_CXXFLAGS`` holds further flags for the compiler: ``-g`` for a debugger; ``-Werror`` in ``.ci/run``; those
of the sanitizers, which the linker needs too (``LDFLAGS``), in ``tests/test_sanitizers.py``.
"""

import os
import re
import shlex
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
VERSION = re.findall(r'^__version__ = "(.+)"', Path("star_kernels/__init__.py").read_text(), re.M)[0]


def cpu_extension():
    """The extension `star_kernels._C`, the build command that knows PyTorch's flags, and the name of that PyTorch."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError as error:
        sys.exit(
            f"star_kernels: building the C++ extension needs torch, and importing it here failed ({error}). "
            "Install torch first and build with `pip install --no-build-isolation .`, or leave "
            "the extension out with STAR_KERNELS_BUILD_CPU=0."
        )
    # Many a Python is configured with -g, which makes the build take twice as long and the library many times as large.
    flags = ["-O3", "-g0", "-Wall", "-Wextra"]
    # The OpenMP runtime comes with libtorch. Linking our own would bring a second thread pool into the process
    # that torch.set_num_threads does not reach, so the symbols are left to be found in libtorch's.
    if "OpenMP" in torch.__config__.parallel_info() and sys.platform == "linux":
        flags.append("-fopenmp")
    flags += shlex.split(os.environ.get("STAR_KERNELS_CXXFLAGS", ""))
    extension = CppExtension(
        "star_kernels._C",
        sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.h")),
        define_macros=[("STAR_KERNELS_FLAGS", '"' + " ".join(flags) + '"')],
        extra_compile_args=flags,
    )
    # PyTorch's headers as system headers: -Wall -Wextra then speak of our sources only.
    for directory in include_paths():
        if directory in extension.include_dirs:
            extension.include_dirs.remove(directory)
            extension.extra_compile_args += ["-isystem", directory]
    named = os.environ.get("STAR_KERNELS_NAME_TORCH", "0") != "0"
    return {
        "version": VERSION + ("+torch" + ".".join(torch.__version__.split(".")[:2]) if named else ""),
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
    }


build_cpu = os.environ.get("STAR_KERNELS_BUILD_CPU", "1") != "0"
# The sdist, and what a build asks for before it begins, know of no torch.
compiles = not {"sdist", "egg_info"} & set(sys.argv)

setup(
    packages=find_packages(include=["star_kernels", "star_kernels.*"])
    + find_packages("python", include=["star_trainer", "star_trainer.*"]),
    package_dir={"star_trainer": "python/star_trainer"},
    package_data={
        "star_kernels.attention": ["table.json"],
        # Of the small models what loads them: the scripts that built them stay in the repository.
        "star_trainer.config": ["presets/*.yaml"],
        "star_trainer.report": ["page.*"],
        "star_trainer.worlds.scenes": [f"tiny_*/**/*.{end}" for end in ("safetensors", "json", "txt", "model")],
    },
    **(cpu_extension() if build_cpu and compiles else {"version": VERSION}),
)
