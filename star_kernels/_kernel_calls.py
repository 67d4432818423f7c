"""How an operator launches its Triton kernels, and how they are compiled where there is no GPU.

An operator describes its kernels in one function, `prepare(*arguments, *values) -> (outputs, calls)`. It allocates the
outputs and what lies between two kernels, and lists a `KernelCall` for each kernel in order. Two things are made of it:

- `launch(prepare, arguments, values)` runs it and returns the outputs. The first time for some shapes, strides, dtypes,
  devices, alignments and scalars it launches through Triton and keeps a plan: what is allocated, the compiled kernels,
  and which pointer goes where. From then on a call fills in pointers and hands them to Triton's compiled launcher, in
  about a tenth of the time. Therefore:
  - `arguments` are tensors and what is hashable, each of one type in all calls: 1, 1.0 and True are one key. A new
    scalar makes a new plan. The first argument is a tensor, and its device that of the kernels.
  - `prepare` sees sizes, strides and dtypes, and no values. It allocates with ``torch.empty`` and the like and takes
    views of its tensors. It must not copy (``contiguous``) or compute: that comes before `launch`, and is refused.
    It may raise: what has been launched once is not prepared again.
  - `outputs` is a tensor that it was given or allocated, or None, or a tuple of these.
  - `values` are floats that a kernel takes as they are, each as an argument: they may be others in every call.
- the static checks call `prepare` with tensors on the ``meta`` device and compile its calls for any architecture:
  pointer alignment, strides of 1 and sizes that 16 divides are specialised exactly as in a launch, because it is
  Triton's own launch path that does it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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

    def launch(self) -> Any:
        """Launch through Triton; returns its compiled kernel, or None where it interprets."""
        return self.kernel[self.grid](**self.arguments, **self.options)

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


class _Launch(NamedTuple):
    """A compiled kernel as Triton's launcher takes it, and its arguments as a function of the plan's pointers."""

    run: Callable[..., None]
    grid: tuple[int, ...]
    function: int
    metadata: Any
    arguments: Callable[[list[int], tuple[float, ...]], tuple[Any, ...]]


class _Plan(NamedTuple):
    """What `launch` does for arguments like those that it was made for.

    Its tensors are the arguments, then what is allocated; pointers are in the same order.
    """

    allocations: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    launches: list[_Launch]
    outputs: Callable[[list[Any]], Any]
    driver: Any
    knobs: Any

    def is_hooked(self) -> bool:
        """Whether a profiler wants to know of launches: Triton itself then tells it."""
        return bool(self.knobs.launch_enter_hook.calls or self.knobs.launch_exit_hook.calls)

    def run(self, tensors: list[Any], pointers: list[int], values: tuple[float, ...], device: torch.device) -> Any:
        for size, stride, dtype in self.allocations:
            allocated = torch.empty_strided(size, stride, dtype=dtype, device=device)
            tensors.append(allocated)
            pointers.append(allocated.data_ptr())
        stream = self.driver.get_current_stream(device.index)
        for run, grid, function, metadata, arguments in self.launches:
            run(*grid, stream, function, metadata, None, None, None, *arguments(pointers, values))
        return self.outputs(tensors)


Prepare = Callable[..., tuple[Any, Sequence[KernelCall]]]
_MOST_PLANS = 1024
_ON_AMD = torch.version.hip is not None
# None where Triton compiles nothing, as in its interpreter.
_plans: dict[tuple[Hashable, ...], _Plan | None] = {}


def launch(prepare: Prepare, arguments: Sequence[Any], values: tuple[float, ...] = ()) -> Any:
    """The outputs of ``prepare(*arguments, *values)``, written by its kernels on the current stream.

    Raises:
        RuntimeError: `prepare` does more than allocate and take views, or depends on more than the metadata.
    """
    key: list[Hashable] = [prepare, len(values)]
    pointers = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            pointer = argument.data_ptr()
            pointers.append(pointer)
            # Triton compiles another kernel where 16 does not divide the pointer, and on AMD where 31 bits do not span
            # its memory.
            key += (argument.shape, argument.stride(), argument.dtype, argument.device, pointer % 16)
            if _ON_AMD:
                key.append(argument.untyped_storage().nbytes() < 2**31)
        else:
            pointers.append(0)
            key.append(argument)
    whole = tuple(key)
    plan = _plans.get(whole)
    device = arguments[0].device
    if plan is None or plan.is_hooked():
        with torch.cuda.device_of(arguments[0]):
            outputs, calls = prepare(*arguments, *values)
            compiled = [call.launch() for call in calls]
            if whole not in _plans:
                if len(_plans) == _MOST_PLANS:
                    _plans.clear()
                _plans[whole] = _plan(prepare, arguments, len(values), calls, compiled)
        return outputs
    if device.index is not None and device.index != plan.driver.get_current_device():
        with torch.cuda.device(device):
            return plan.run([*arguments], pointers, values, device)
    return plan.run([*arguments], pointers, values, device)


def _plan(
    prepare: Prepare, arguments: Sequence[Any], num_values: int, calls: Sequence[KernelCall], compiled: list[Any]
) -> _Plan | None:
    """The plan by which `calls` were launched, or None where Triton compiled nothing.

    Where a pointer comes from is found out with stand-ins without memory, each in a storage of its own: tensors that
    are given may lie in one another.
    """
    stand_ins = [
        torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")
        if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    ]
    with _Allocations(prepare) as made:
        outputs, like = prepare(*stand_ins, *(_Value(i) for i in range(num_values)))
    import triton

    if not all(isinstance(kernel, triton.compiler.CompiledKernel) for kernel in compiled):
        return None
    source = _Source([*stand_ins, *made.tensors])
    launches = [
        _Launch(
            kernel.run, (*call.grid, 1, 1)[:3], kernel.function, kernel.packed_metadata, source.arguments(call, other)
        )
        for call, other, kernel in zip(calls, like, compiled, strict=True)
    ]
    allocations = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in made.tensors]
    driver, knobs = triton.runtime.driver.active, triton.knobs.runtime
    return _Plan(allocations, launches, source.outputs(outputs), driver, knobs)


class _Allocations(TorchDispatchMode):
    """Keeps the tensors that are allocated, and refuses what computes."""

    def __init__(self, prepare: Prepare) -> None:
        super().__init__()
        self.prepare = prepare
        self.tensors: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # for that PyTorch would import its compiler, which takes seconds

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "empty" in function.name():
            self.tensors.append(result)
        elif not function.is_view:
            name = f"{self.prepare.__module__}.{self.prepare.__qualname__}"
            raise RuntimeError(f"{name}: expected to allocate and to take views only, it calls {function.name()}")
        return result


class _Value(float):
    """Stands in for the value of this index."""


class _Source:
    """Finds the tensors of a plan in what `prepare` made of their stand-ins."""

    def __init__(self, stand_ins: list[Any]) -> None:
        self.stand_ins = stand_ins
        self.of_storage = {t.untyped_storage()._cdata: i for i, t in enumerate(stand_ins) if isinstance(t, Tensor)}

    def arguments(self, call: KernelCall, like: KernelCall) -> Callable[..., tuple[Any, ...]]:
        """The arguments of `call` in the order of its parameters, from the the pointers and values.

        `like` is the same call with stand-ins.
        """
        values = tuple((call.arguments[name], like.arguments[name]) for name in call.kernel.arg_names)
        constants: list[Any] = []
        source = "".join(f"{self._argument(call.name, *pair, constants)}, " for pair in values)
        return eval(f"lambda p, v: ({source})", {"c": constants})

    def _argument(self, name: str, value: Any, like: Any, constants: list[Any]) -> str:
        if isinstance(value, tuple):
            parts = (self._argument(name, *pair, constants) for pair in zip(value, like, strict=True))
            return f"({''.join(f'{part}, ' for part in parts)})"
        if isinstance(value, Tensor):
            offset = like.storage_offset() * like.itemsize
            return f"p[{self._index(like)}]" + (f" + {offset}" if offset else "")
        if isinstance(like, _Value):
            return f"v[{int(like)}]"
        if value != like:
            raise RuntimeError(f"{name}: expected arguments that depend on metadata alone, got {value} and {like}")
        if value is None or isinstance(value, int):
            return repr(value)
        constants.append(value)
        return f"c[{len(constants) - 1}]"

    def outputs(self, outputs: Any) -> Callable[[list[Any]], Any]:
        """The outputs from the plan's tensors."""
        return eval(f"lambda t: {self._output(outputs)}")

    def _output(self, output: Any) -> str:
        if isinstance(output, tuple):
            return f"({''.join(f'{self._output(part)}, ' for part in output)})"
        if output is None:
            return "None"
        index = self._index(output)
        if _layout(output) != _layout(self.stand_ins[index]):
            raise RuntimeError(f"outputs: expected tensors that are given or allocated, got a view {output.shape}")
        return f"t[{index}]"

    def _index(self, tensor: Tensor) -> int:
        return self.of_storage[tensor.untyped_storage()._cdata]


def _layout(tensor: Any) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype
