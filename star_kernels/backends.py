"""Which backends exist on this machine, and which one an operator call uses.

Three backends compute the same mathematics: ``triton`` (GPU kernels), ``cpu`` (the compiled C++
extension) and ``reference`` (plain PyTorch, any device). ``auto`` prefers triton for CUDA tensors and
the C++ extension for CPU tensors, and falls back to the reference where the preferred one is missing,
saying so once. The environment variable ``STAR_KERNELS_BACKEND`` overrides ``auto``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import re
import sys
from pathlib import Path

import torch

NAMES = ("triton", "cpu", "reference")
_logger = logging.getLogger("star_kernels")


# Must equal kInterface in csrc/bindings.cpp.
_EXTENSION_INTERFACE = 6


@functools.cache
def load_cpu_extension() -> str | None:
    """Load the compiled extension; ``None`` if that worked, otherwise the reason it did not."""
    if (reason := _built_with_another_torch()) is not None:
        return reason
    try:
        extension = importlib.import_module("star_kernels._C")
    except ImportError as error:
        return f"the C++ extension star_kernels._C is not built or does not load ({error})"
    return _reason_against_extension(extension.build_info())


@functools.cache
def _built_with_another_torch() -> str | None:
    """Why the extension must not even be loaded: PyTorch's C++ interface changes with its minor versions."""
    spec = importlib.util.find_spec("star_kernels._C")
    if spec is None or spec.origin is None:
        return None
    # kBuiltWith in csrc/bindings.cpp
    built = re.search(rb"star_kernels\._C was built with torch (\d+\.\d+)", Path(spec.origin).read_bytes())
    wanted = ".".join(torch.__version__.split(".")[:2])
    if built is None or built[1].decode() == wanted:
        return None
    return (
        f"the C++ extension star_kernels._C was built with torch {built[1].decode()} and is not loaded under "
        f"{torch.__version__}: install the wheel for torch {wanted}, or build it again "
        "(pip install --no-build-isolation --force-reinstall --no-deps . in a checkout)"
    )


def _reason_against_extension(info: dict[str, object]) -> str | None:
    found = info.get("interface", 1)
    if found == _EXTENSION_INTERFACE:
        return None
    return (
        f"the C++ extension star_kernels._C was built from other sources (its interface is {found}, these need "
        f"{_EXTENSION_INTERFACE}): build it again"
    )


def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return None
    return "no GPU that PyTorch can use (set TRITON_INTERPRET=1 to interpret the kernels on the CPU)"


def available_backends() -> dict[str, str | None]:
    """Backends by name: ``None`` where one can be used here, otherwise the reason it cannot.

    Whether an operator has a kernel for a backend is a second question, answered by its docstring
    and by the error that asking for a missing one raises.
    """
    return {"triton": _missing_triton(), "cpu": load_cpu_extension(), "reference": None}


@functools.cache
def say_once(message: str) -> None:
    _logger.warning(message)


def resolve_backend(operator: str, backend: str, device: torch.device, kernels: tuple[str, ...]) -> str:
    """Name of the backend that `operator` runs on for tensors on `device`.

    Args:
        operator: public name, for messages.
        backend: ``auto``, ``triton``, ``cpu`` or ``reference``.
        device: where the tensors are.
        kernels: the backends other than ``reference`` that this operator has a kernel for.

    Raises:
        ValueError: `backend` is not a known name.
        RuntimeError: `backend` was asked for by name and cannot run here; the message says why.
    """
    source = "backend"
    if backend == "auto" and (override := os.environ.get("STAR_KERNELS_BACKEND")):
        backend, source = override, "STAR_KERNELS_BACKEND"
    if backend not in (*NAMES, "auto"):
        raise ValueError(f"{source}: expected one of auto, {', '.join(NAMES)}, got {backend!r}")
    if backend == "reference":
        return backend
    if backend == "auto":
        preferred = "cpu" if device.type == "cpu" else "triton"
        reason = _reason_against(operator, preferred, device, kernels)
        if reason is None:
            return preferred
        say_once(f"{operator} runs on its reference implementation: {reason}")
        return "reference"
    reason = _reason_against(operator, backend, device, kernels)
    if reason is not None:
        raise RuntimeError(f"{source}={backend!r} cannot run {operator}: {reason}")
    return backend


def _reason_against(operator: str, backend: str, device: torch.device, kernels: tuple[str, ...]) -> str | None:
    if backend not in kernels:
        return f"{operator} has no {backend} kernel"
    if backend == "cpu":
        return f"its tensors are on {device}" if device.type != "cpu" else load_cpu_extension()
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its tensors are on the CPU, where Triton kernels run only under TRITON_INTERPRET=1"
    # Both have been found once a kernel has run, and looking for them takes longer than the call.
    return None if device.type == "cuda" and "triton" in sys.modules else _missing_triton()


# Of an extension that is there and cannot be used one hears at import, not in the middle of a run.
if (_reason := _built_with_another_torch()) is not None:
    say_once(_reason)
