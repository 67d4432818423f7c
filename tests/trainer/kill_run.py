"""Run a training that kills itself with SIGKILL at a chosen point: ``python kill_run.py POINT FOLDER override...``.

Launched as several processes, the last one alone kills itself.
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
    elif point == "checkpoint":
        # The second checkpoint's files are written, its name is not.
        checkpoint.os.rename = after_calls(checkpoint.os.rename, 1)
    else:
        raise SystemExit(f"unknown point {point}")
    raise SystemExit(cli.main(["tiny", f"run.folder={folder}", *overrides]))


if __name__ == "__main__":
    main()
