"""Argument checks shared by the public functions: every message names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _format(shape: Sequence[int | str]) -> str:
    # Called only for an error: torch.compile cannot turn a symbolic size into a string.
    return "[" + ", ".join(str(size) for size in shape) + "]"


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
    allow_empty: bool = False,
) -> torch.Tensor:
    """Return `value` if it is a tensor of that shape, dtype and device.

    `shape` holds an int where the size is known and a symbol (``"B"``) where any size will do.

    Raises:
        TypeError: not a tensor, or a dtype outside `dtypes`.
        ValueError: wrong rank, size or device, or a dimension of size zero unless `allow_empty`.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {_format(shape)}, got {type(value).__name__}")
    if value.shape != shape:
        _check_shape(name, value, shape, allow_empty)
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like the other arguments, got one on {value.device}")
    return value


def _check_shape(name: str, value: torch.Tensor, shape: Sequence[int | str], allow_empty: bool) -> None:
    if value.dim() != len(shape):
        came = _format(value.shape)
        raise ValueError(
            f"{name}: expected {len(shape)} dimensions {_format(shape)}, got {value.dim()} with shape {came}"
        )
    for size, expected in zip(value.shape, shape, strict=True):
        if isinstance(expected, str):
            if size == 0 and not allow_empty:
                came = _format(value.shape)
                raise ValueError(f"{name}: expected shape {_format(shape)} without zero sizes, got {came}")
        elif size != expected:
            raise ValueError(f"{name}: expected shape {_format(shape)}, got {_format(value.shape)}")


def check_reverse_mode(operator: str, inputs: Iterable[object]) -> None:
    """Raise NotImplementedError inside a torch.func transform, or if one of `inputs` carries a tangent.

    PyTorch would drop the tangents, since the operators have no forward-mode formula, and give zero.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"{operator}: torch.func transforms are out of scope, use torch.autograd.grad")
    if forward_ad._current_level < 0:
        return
    for value in inputs:
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{operator}: forward-mode derivatives are out of scope, use torch.autograd.grad")


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`, else raise a ValueError that lists them."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return str(value)


def check_number(
    name: str,
    value: object,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """Return `value` as a float if it is a finite number in the interval given.

    Raises:
        TypeError: not a real number.
        ValueError: NaN, infinite, or outside the interval.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    inside = (
        value == value
        and abs(value) != float("inf")
        and (low is None or (value > low if low_open else value >= low))
        and (high is None or (value < high if high_open else value <= high))
    )
    if not inside:
        interval = (
            f"{'(' if low_open or low is None else '['}{'-inf' if low is None else low}, "
            f"{'inf' if high is None else high}{')' if high_open or high is None else ']'}"
        )
        raise ValueError(f"{name}: expected a number in {interval}, got {value}")
    return float(value)
