"""How an operator is registered, and how it is called without what the registration costs.

torch.library lets torch.compile, fake tensors and dispatch modes see an operator as one node with a derivative of its
own. Its dispatch in Python takes 40 to 80 µs, several times what the rest of a call does, so it is gone through only
where somebody looks: elsewhere the function itself runs, under autograd as a torch.autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result without what that imports, torch._dynamo with numpy and sympy."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_traced(arguments: Iterable[object]) -> bool:
    """Whether somebody looks at the operators that run: torch.compile, export, modes, subclasses, the profiler.

    A tensor on the meta device has no values for a kernel: the registration gives its shape.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
    ):
        return True
    for argument in arguments:  # a generator would take as long as all of this
        if isinstance(argument, Tensor) and (type(argument) is not Tensor or argument.is_meta):
            return True
    return False


def operator(
    name: str,
    *,
    fake: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    schema: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the function that computes ``star_kernels::name`` from arguments by position, and is then called.

    Args:
        fake: the outputs without their values, from the same arguments.
        save: `setup_context` of torch.library.register_autograd: (ctx, inputs, output) -> None.
        backward: (ctx, *gradients of the outputs) -> a gradient or None for each argument. Without it the operator has
            no derivative, and asking for one is an error.
        schema: what torch.library.custom_op cannot read from the function's annotations.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        registered = torch.library.custom_op(f"star_kernels::{name}", function, mutates_args=(), schema=schema)
        registered.register_fake(fake)
        differentiable: Callable[..., Any] = registered
        if save is not None and backward is not None:
            registered.register_autograd(backward, setup_context=save)
            differentiable = _in_eager_mode(function, save, backward)

        def call(*arguments: Any) -> Any:
            if is_traced(arguments):
                return registered(*arguments)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
                return differentiable(*arguments)
            return function(*arguments)

        return call

    return register


def _in_eager_mode(
    function: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """`function` with its derivative as a torch.autograd.Function."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    return apply_of(Eager)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without what it does in Python, which is for torch.func."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
