"""The trainer in processes that are forked from one which has imported it: Python and its imports take six seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent
TIMEOUT = 300.0  # seconds for each process
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "star_trainer.train",
        "star_trainer.rewards.models.clip",
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
        "transformers.models.clip.modeling_clip",
        "transformers.models.t5.modeling_t5",
        "peft",
    ]
)


def run_forked(main: Callable[[], object], arguments: list[str], processes: int = 1) -> tuple[list[int], list[str]]:
    """Call `main` with these command-line arguments in so many processes, as `torchrun` would start them.

    Returns:
        By rank, the exit codes, below 0 for a signal, and all that was printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}.txt" for rank in range(processes)]
        started = []
        for rank, output in enumerate(outputs):
            # The server's own environment is that of the test which started it.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            if processes > 1:
                environment |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            process = _CONTEXT.Process(target=_run, args=(main, arguments, output, environment))
            process.start()
            started.append(process)
        try:
            for process in started:
                process.join(TIMEOUT)
        finally:
            late = [process for process in started if process.exitcode is None]
            for process in late:
                process.kill()
                process.join()
        printed = [output.read_text() for output in outputs]
    assert not late, (f"{len(late)} of {processes} processes still ran after {TIMEOUT:.0f} s", printed)
    return [process.exitcode for process in started], printed


def _run(main: Callable[[], object], arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    with output.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    sys.path.insert(0, str(HERE))
    torch.set_num_threads(1)
    raise SystemExit(main())
