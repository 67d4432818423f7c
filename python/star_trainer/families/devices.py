"""Which device is this process's, and how tensors get there."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def own_device() -> torch.device:
    """This process's GPU by its number, else the CPU.

    A model that is on ``cuda`` without a number is on another device for threads and for what comes before processes
    have chosen theirs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the host to a GPU without waiting for it, which takes pinned memory."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
