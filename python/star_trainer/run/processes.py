"""What several processes of one run tell each other (numbers, and that one cannot go on), and that runs do not meet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import Tensor

from star_trainer.config import ConfigError, TrainerError
from star_trainer.run.interruption import Interrupted, asked

Result = TypeVar("Result")

# Seconds; what is waited for takes microseconds once the lock is free.
_MOMENT = 0.5


def gather(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The processes' tensors of one shape, joined along the first axis in the order of the processes."""
    if accelerator.num_processes == 1:
        return values
    gathered: Tensor = accelerator.gather(values.to(accelerator.device).contiguous())
    return gathered.to(values.device)


def gather_array(accelerator: Accelerator, values: np.ndarray) -> np.ndarray:
    """`gather` for numpy."""
    return gather(accelerator, torch.from_numpy(np.ascontiguousarray(values))).numpy()


class OutOfMemory(TrainerError, RuntimeError):
    """A device, or the host, has no memory left."""

    def __init__(self, reason: object) -> None:
        super().__init__(
            f"out of memory ({str(reason).splitlines()[0]}); smaller batch sizes, model.gradient_checkpointing=true, "
            "rollout.keep_on_host=true or model.sharded=true need less"
        )


def lacks_memory(error: BaseException) -> bool:
    """Whether `error` says that there is no memory left, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


def own_places(accelerator: Accelerator, total: int) -> np.ndarray:
    """The places, among `total` samples of an iteration, of those that this process draws: every n-th of n processes.

    As many for every process, so that all run the model equally often and tell each other tensors of one shape: the
    last place of some may be `total` or more, and what is drawn there counts nowhere.
    """
    processes = accelerator.num_processes
    return accelerator.process_index + processes * np.arange(-(-total // processes))


def gather_samples(accelerator: Accelerator, values: Tensor, total: int) -> Tensor:
    """What the processes have of their `own_places` [b, ...], as [total, ...] in the order of the places."""
    processes = accelerator.num_processes
    gathered = gather(accelerator, values).unflatten(0, (processes, len(values)))
    return gathered.transpose(0, 1).flatten(0, 1)[:total]


def fail_together(
    accelerator: Accelerator, action: Callable[[], Result], *failures: type[Exception], stoppable: bool = True
) -> Result:
    """Run `action`; where it fails in one process, all fail, so that none waits for a process that is gone.

    Args:
        accelerator: knows the processes.
        action: must not itself wait for other processes.
        failures: what may be raised by it and is told to the others, which raise the first of these types.
        stoppable: whether a signal to any process ends all of them here.

    Raises:
        OutOfMemory: in the process that has none left.
        Interrupted: in all processes, where one was asked to end the run.
    """
    error: BaseException | None = None
    told_to_others: tuple[type[BaseException], ...] = (*failures, Interrupted)
    try:
        result = action()
    except told_to_others as raised:
        error = raised
    except (MemoryError, RuntimeError) as raised:
        if not lacks_memory(raised):
            raise
        error = OutOfMemory(raised)
    signal = (asked() or 0) if stoppable else 0
    failed = error is not None and not isinstance(error, Interrupted)
    told = gather(accelerator, torch.tensor([[int(failed), signal]]))
    if failed:
        assert error is not None
        raise error
    if told[:, 0].any():
        raise failures[0](f"process {int(told[:, 0].argmax())} of {len(told)} cannot go on, as it says itself")
    if told[:, 1].any():
        raise Interrupted.by(int(told[:, 1].max()))
    return result


def stop_together(accelerator: Accelerator) -> None:
    """End the run here, in all processes, where one of them was asked to; all must call it.

    Raises:
        Interrupted: one was.
    """
    fail_together(accelerator, lambda: None)


@contextmanager
def locked_folder(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs out of a run's folder, where they would overwrite each other's checkpoints and log.

    Raises:
        ConfigError: another run is in it.
    """
    lock = FileLock(folder / ".lock")

    def enter() -> None:
        if not accelerator.is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"run.folder: another process is training in {folder}") from error

    fail_together(accelerator, enter, ConfigError, OSError)
    try:
        yield
    finally:
        lock.release()


def let_go_of_collectives(accelerator: Accelerator) -> None:
    """Give the threads of the process group time to drop what they hold of finished collectives, before it ends.

    The last reference to a group that gradients are averaged in goes with the model, under the interpreter's lock, and
    its destructor waits for those threads, one of which may want that lock to free a tensor: both would wait for ever.
    Seen with gloo of PyTorch 2.13 where a run ended right after a collective.
    """
    if accelerator.num_processes > 1:
        time.sleep(_MOMENT)


def lost_process(error: BaseException) -> bool:
    """Whether `error` says that another process of the run is gone or does not answer."""
    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def is_sharded(model: Any) -> bool:
    """Whether the weights of `model` are spread over the processes (fully sharded data parallel)."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def is_distributed_tensor(tensor: Tensor) -> bool:
    """Whether each process has only a part of `tensor`."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor's full value; where it is spread over the processes, all of them must ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which every process has whole, spread over the processes as `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@contextmanager
def without_synchronisation(accelerator: Accelerator, model: Any, *, active: bool) -> Iterator[None]:
    """Within this context gradients are only added up; sharded ones are always sent, since none could hold them."""
    if not active or accelerator.num_processes == 1 or is_sharded(model):
        yield
        return
    with accelerator.no_sync(model):
        yield
