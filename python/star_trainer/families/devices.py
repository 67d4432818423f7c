"""Which device is this process's."""

from __future__ import annotations

import os

import torch


def own_device() -> torch.device:
    """This process's GPU by its number, else the CPU.

    A model that is on ``cuda`` without a number is on another device for threads and for what comes before processes
    have chosen theirs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
