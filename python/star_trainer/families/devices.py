"""Which device is this process's, how tensors get there, and what the thread of rewards has for itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor


def own_device() -> torch.device:
    """This process's GPU by its number, as accelerate numbers them, else the CPU.

    A model that is on ``cuda`` without a number is on another device for threads and for what comes before processes
    have chosen theirs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each process its own GPU alone.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the host to a GPU without waiting for it, which takes pinned memory."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def use_own_device() -> None:
    """Make this process's GPU what ``cuda`` without a number is in the calling thread; nothing without a GPU."""
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)


def own_worker() -> ThreadPoolExecutor:
    """One thread beside this one, on this process's GPU and there on a CUDA stream of its own.

    On the stream that sampling uses, every call of the thread would wait for all that sampling has asked for.
    """
    return ThreadPoolExecutor(1, initializer=_use_own_stream)


def _use_own_stream() -> None:
    use_own_device()
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


def finish(device: torch.device) -> None:
    """Wait for what the calling thread's stream was given on a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Handover:
    """A tensor of one thread's CUDA stream for a thread with another one; on a CPU the tensor as it is.

    Made by the thread that computes the tensor, after it was asked for.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._ready = None
        if tensor.device.type == "cuda":
            self._ready = torch.cuda.current_stream(tensor.device).record_event()

    @contextmanager
    def taken(self) -> Iterator[Tensor]:
        """Within this context the calling thread's stream may use the tensor; at its end all it was given is done."""
        if self._ready is None:
            yield self._tensor
            return
        stream = torch.cuda.current_stream(self._tensor.device)
        stream.wait_event(self._ready)
        # Its memory is the other stream's, which would use it again as soon as the last reference is gone.
        self._tensor.record_stream(stream)
        yield self._tensor
        # What comes out of here, or stays in a reward for its next call, is for any stream.
        stream.synchronize()


def own_threads() -> int | None:
    """This process's share of the cores, at least 1; None where it shares the machine with no other process."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes == 1:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)
