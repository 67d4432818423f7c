"""Run a training that kills itself with SIGKILL at a chosen point: ``python kill_run.py POINT FOLDER override...``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_calls(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`function`, which works `count` times and then kills the process."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > count:
            die()
        return function(*args, **kwargs)

    return counted


def main() -> None:
    point, folder, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    import star_trainer.checkpoint as checkpoint
    import star_trainer.train as loop
    from star_trainer.config import load_config

    if point == "rollout":
        # In the rollout of the third iteration, one iteration past the last checkpoint.
        loop.collect = after_calls(loop.collect, 2)
    elif point == "update":
        # Between the second and the third backward pass of an update: half of a gradient is there.
        loop.step_loss = after_calls(loop.step_loss, 6)
    elif point == "checkpoint":
        # The second checkpoint's files are written, its name is not.
        checkpoint.os.rename = after_calls(checkpoint.os.rename, 1)
    else:
        raise SystemExit(f"unknown point {point}")
    loop.train(load_config("tiny", [f"run.folder={folder}", *overrides]))


if __name__ == "__main__":
    main()
