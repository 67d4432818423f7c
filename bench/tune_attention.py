"""Find the configurations of the Triton attention kernel for the GPU at hand: ``python -m bench.tune_attention``.

Times every candidate of a row at 512 and at 1024 px, with and without capture, drops those that do not fit or do not
agree with PyTorch's attention, and prints the others, the best first, and then the row as it goes into
``CONFIGURATIONS`` of star_kernels/attention/table.json. Nothing is tuned at run time: the table is what runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from star_kernels.attention import triton_kernels
from star_kernels.attention.table import CONFIGURATIONS, Configuration, architecture_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
IMAGE_AND_TEXT = {"S": (1024, 205), "L": (4096, 333)}
BATCH, WIDTH, UNITS = 8, 1536, 8
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one configuration, by shape and whether it captures."""

    configuration: Configuration
    milliseconds: dict[str, float]

    def score(self, best: dict[str, float]) -> float:
        """How many times the best time of each case this takes, as a geometric mean."""
        ratios = [self.milliseconds[case] / best[case] for case in best]
        return math.exp(sum(map(math.log, ratios)) / len(ratios))


def candidates(architecture: str, dtype: torch.dtype, head_dim: int) -> Iterator[Configuration]:
    """The configurations worth timing: those whose tiles fit into shared memory and registers."""
    nvidia = architecture.startswith("sm_")
    wide = dtype == torch.float32
    lanes = 32 if nvidia else 64
    for block_m, block_n, warps, stages, registers in itertools.product(
        (16, 32, 64) if wide else (64, 128, 256),
        (16, 32, 64) if wide else (32, 64, 128),
        (4, 8),
        (2, 3, 4) if nvidia and not wide else (1, 2),
        (None, 128, 168) if nvidia and not wide else (None,),
    ):
        shared = (block_m + 2 * stages * block_n) * head_dim * dtype.itemsize
        # Logits and output are in float32, two registers of logits beside each of probabilities.
        per_thread = block_m * (1.5 * block_n + head_dim) / (lanes * warps)
        if shared <= SHARED_MEMORY[architecture] and per_thread <= (registers or 255):
            yield Configuration(block_m, block_n, warps, stages, registers)


def _inputs(name: str, dtype: torch.dtype, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value and unit weights."""
    image, text = IMAGE_AND_TEXT[name]
    shape = (BATCH, image + text, WIDTH // head_dim, head_dim)
    query, key, value = (torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))
    return query, key, value, (torch.rand(BATCH, text, UNITS, device="cuda") < 0.1).float()


def _time(
    configuration: Configuration,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None,
    image: int,
    expected: Tensor,
) -> float:
    """Milliseconds of one call; infinite where it does not compile, does not fit or is wrong."""
    (out, _, _), calls = triton_kernels.prepare(
        query,
        key,
        value,
        unit_weights,
        num_image_tokens=image,
        text_first=False,
        scale=query.shape[3] ** -0.5,
        rows=(0, BATCH),
        configuration=configuration,
    )

    def run() -> None:
        for call in calls:
            call.launch()

    try:
        run()
        torch.cuda.synchronize()
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError) as error:
        print(f"  {configuration}: {type(error).__name__}", flush=True)
        return math.inf
    wrong = (out.float() - expected.float()).abs().max() / expected.float().abs().max()
    if not wrong <= LARGEST_ERROR[out.dtype]:
        print(f"  {configuration}: relative error {float(wrong):.1e} against PyTorch's attention", flush=True)
        return math.inf
    return float(triton.testing.do_bench(run, quantiles=[0.5]))


def tune(architecture: str, dtype: torch.dtype, head_dim: int, shapes: Sequence[str]) -> list[Timing]:
    """All candidates that work, the best first."""
    times: dict[Configuration, dict[str, float]] = {c: {} for c in candidates(architecture, dtype, head_dim)}
    for name in shapes:
        query, key, value, unit_weights = _inputs(name, dtype, head_dim)
        expected = scaled_dot_product_attention(query, key, value)
        for case, units in ((name, None), (f"{name} with capture", unit_weights)):
            for configuration in list(times):
                milliseconds = _time(configuration, query, key, value, units, IMAGE_AND_TEXT[name][0], expected)
                times[configuration][case] = milliseconds
                if math.isinf(milliseconds):
                    del times[configuration]
    timings = [Timing(configuration, found) for configuration, found in times.items()]
    if not timings:
        return []
    best = {case: min(timing.milliseconds[case] for timing in timings) for case in timings[0].milliseconds}
    return sorted(timings, key=lambda timing: timing.score(best))


def row(dtype: torch.dtype, head_dim: int, timing: Timing, device: str) -> str:
    """The winner as a line of ``CONFIGURATIONS``."""
    values = [value for value in asdict(timing.configuration).values() if value is not None]
    times = ", ".join(f"{case} {milliseconds:.3f} ms" for case, milliseconds in timing.milliseconds.items())
    return f"({dtype.itemsize}, {head_dim}): Configuration({', '.join(map(str, values))}),  # {device}: {times}"


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--head-dim", nargs="+", type=int, choices=(32, 64, 128), default=[64])
    parser.add_argument("--shape", nargs="+", choices=IMAGE_AND_TEXT, default=list(IMAGE_AND_TEXT))
    parser.add_argument("--show", type=int, default=10, help="how many of the best to print per row")
    parser.add_argument("--json", type=Path, help="where to write all timings")
    options = parser.parse_args(arguments)

    if not torch.cuda.is_available():
        for dtype, head_dim in itertools.product(options.dtype, options.head_dim):
            for architecture in CONFIGURATIONS:
                count = sum(1 for _ in candidates(architecture, DTYPES[dtype], head_dim))
                say(f"{architecture}, {dtype}, head dim {head_dim}: {count} candidates")
        parser.exit(1, "Timing the candidates needs a GPU, and PyTorch finds none here.\n")

    architecture = architecture_of(torch.device("cuda"))
    device = torch.cuda.get_device_name()
    found = []
    for dtype, head_dim in itertools.product(options.dtype, options.head_dim):
        timings = tune(architecture, DTYPES[dtype], head_dim, options.shape)
        say(f"{architecture}, {dtype}, head dim {head_dim}: {len(timings)} candidates work")
        for timing in timings[: options.show]:
            say("  " + row(DTYPES[dtype], head_dim, timing, device))
        found += [{"dtype": dtype, "head_dim": head_dim, **asdict(timing)} for timing in timings]
        if timings:
            say(f"for the table of {architecture}:")
            say(row(DTYPES[dtype], head_dim, timings[0], device))
    if options.json is not None:
        options.json.write_text(
            json.dumps({"device": device, "triton": triton.__version__, "timings": found}, indent=1)
        )


if __name__ == "__main__":
    main()
