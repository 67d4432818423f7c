"""One record for what a Triton kernel is launched with, which is also what it is compiled with where there is no GPU.

An op builds its calls in one function. On a GPU it launches them. The static checks build the same calls out of tensors
on the ``meta`` device and compile them for any architecture: pointer alignment, strides of 1 and sizes that 16 divides
are then specialised exactly as in a launch, because it is Triton's own launch path that does it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ARCHITECTURES: dict[str, tuple[str, int | str, int]] = {  # name -> backend, architecture, threads of a warp
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class KernelCall:
    """A kernel with its grid, its arguments by parameter name (tensors, numbers, constants) and its options.

    `name` says which row of the configuration table this is, for reports: the problem, not the architecture.
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def launch(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)

    def compile(self, architecture: str) -> Any:
        """Triton's compiled kernel for one of `ARCHITECTURES`, from a process without TRITON_INTERPRET."""
        import triton
        from triton.backends.compiler import GPUTarget

        if not isinstance(self.kernel, triton.JITFunction):
            raise RuntimeError(f"{self.name}: compiling needs a process in which TRITON_INTERPRET is not set")
        runtime = triton.runtime.driver
        active = runtime._active
        runtime.set_active(_NoDevice(architecture, GPUTarget(*ARCHITECTURES[architecture])))
        try:
            return self.kernel.warmup(grid=self.grid, **self.arguments, **self.options)
        finally:
            runtime.set_active(active)


class _NoDevice:
    """What Triton's launch path asks of a driver before it would touch the device."""

    def __init__(self, name: str, target: Any) -> None:
        self.name = name
        self.target = target

    def get_current_device(self) -> str:  # Triton keeps compiled kernels by device.
        return self.name

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target
