"""Calls that are given up when they take too long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def call_within(seconds: float, function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)`, run in a thread that does not keep the process alive, on the caller's GPU and stream.

    Raises:
        TimeoutError: it has not returned after `seconds`; nothing waits for it any more, but it may go on.
    """
    done: Future[Result] = Future()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if stream is not None:
                # Which sets the device, too.
                torch.cuda.set_stream(stream)
            done.set_result(function(*arguments))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(timeout=seconds)
    except NotDone:
        # It may be the function's own.
        if done.done():
            raise
        raise TimeoutError(f"no answer within {seconds:g} s") from None
