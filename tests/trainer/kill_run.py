"""Run a training that kills or fails itself at a chosen point: ``python kill_run.py POINT FOLDER override...``.

Launched as several processes, the last one alone does.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run_out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def after_calls(function: Callable[..., Any], count: int, end: Callable[[], None] = die) -> Callable[..., Any]:
    """`function`, which works `count` times and then kills the process, or ends it otherwise."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count + 1:
            end()
        return function(*args, **kwargs)

    return counted


def main() -> None:
    point, folder, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    import star_trainer.algorithms.policy_gradient as policy_gradient
    import star_trainer.run.checkpoint as checkpoint
    from star_trainer import cli

    if int(os.environ.get("RANK", 0)) + 1 < int(os.environ.get("WORLD_SIZE", 1)):
        pass
    elif point == "rollout":
        # In the rollout of the third iteration, one iteration past the last checkpoint.
        policy_gradient.collect = after_calls(policy_gradient.collect, 2)
    elif point == "update":
        # Between the second and the third backward pass of an update: half of a gradient is there.
        policy_gradient.step_loss = after_calls(policy_gradient.step_loss, 6)
    elif point == "signal":
        # In the first pass of the third iteration.
        policy_gradient.step_loss = after_calls(policy_gradient.step_loss, 8, terminate)
    elif point == "memory":
        policy_gradient.step_loss = after_calls(policy_gradient.step_loss, 8, run_out_of_memory)
    elif point == "checkpoint":
        # The second checkpoint's files are written, its name is not.
        checkpoint.os.rename = after_calls(checkpoint.os.rename, 1)
    else:
        raise SystemExit(f"unknown point {point}")
    raise SystemExit(cli.main(["tiny", f"run.folder={folder}", *overrides]))


if __name__ == "__main__":
    main()
