"""The trainer in processes that are forked from one which has imported it: Python and its imports take six seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
TIMEOUT = 300.0  # seconds
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "star_trainer.train",
        "star_trainer.rewards.clip",
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
        "transformers.models.clip.modeling_clip",
        "transformers.models.t5.modeling_t5",
        "peft",
    ]
)


def run_forked(main: Callable[[], object], arguments: list[str], folder: Path, processes: int = 1) -> list[int]:
    """Call `main` with these command-line arguments in so many processes, as `torchrun` would start them.

    Their output goes to `folder`/output_RANK.txt.

    Returns:
        Their exit codes by rank, below 0 for a signal.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **{"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            }
        output = folder / f"output_{rank}.txt"
        started.append(_CONTEXT.Process(target=_run, args=(main, arguments, output, environment)))
    for process in started:
        process.start()
    for process in started:
        process.join(TIMEOUT)
    late = [process for process in started if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {processes} processes still ran after {TIMEOUT:.0f} s"
    return [process.exitcode for process in started]


def _run(main: Callable[[], object], arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    with output.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(environment)
    sys.argv[1:] = arguments
    sys.path.insert(0, str(HERE))
    import torch

    torch.set_num_threads(1)
    raise SystemExit(main())
