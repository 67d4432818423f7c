"""Measure star_kernels/attention/table.json for the GPU at hand: ``python -m bench.tune_attention``.

For each row of the table, bytes per element and head dimension:

1. Candidates are compiled, without and with capture, in as many processes as there are processors. Those stay that the
   static report has nothing against: no spills, wgmma that is left in flight on sm_90, two warps per scheduler on
   NVIDIA, and of those alike but for the limit of registers one for each number of blocks on an SM. This needs no GPU:
   ``--architecture sm_90`` on any machine does it ahead, with the Triton and the folder of the later run.
2. They are timed in batches, each in turn with the row as it stands, at 512 and at 1024 px, without and with capture.
3. With the best one, attention's two implementations are timed at several lengths: what a rollout does, the forward
   pass with capture, and what an update does, forward and backward without.

Each result is a line of the log at once, and what a log has is not done again, so that a run that was stopped goes on.
The table is written after each row.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import os
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import star_kernels as sk
from bench import harness, static_gpu
from bench.harness import Clock, Group, Member
from star_kernels.attention import table, triton_kernels
from star_kernels.attention.table import CONFIGURATIONS, Configuration

DTYPES = {2: torch.bfloat16, 4: torch.float32}
HEAD_DIMS = (32, 64, 128)


class Size(NamedTuple):
    """Samples, heads times head dimension, image and text tokens."""

    batch: int
    width: int
    image: int
    text: int


Sizes = dict[str, Size]
# S and L, 512 and 1024 px, are what tiles are timed at; all are what implementations are.
SIZES: Sizes = {
    "256 px": Size(8, 1536, 256, 205),
    "S": Size(8, 1536, 1024, 205),
    "L": Size(8, 1536, 4096, 333),
    "2048 px": Size(1, 1536, 16384, 333),
}
TOY_SIZES: Sizes = {"S": Size(1, 32, 10, 5), "L": Size(1, 32, 20, 9)}
TIMED = ("S", "L")
UNITS = 8
TOGETHER = 12  # candidates of a batch
LARGEST_ERROR = {2: 2e-2, 4: 1e-4}
SOURCES = sorted(table.PATH.parent.glob("*.py"))


@dataclass(frozen=True)
class Row:
    architecture: str
    itemsize: int
    head_dim: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.itemsize]

    @property
    def shipped(self) -> Configuration:
        return CONFIGURATIONS[self.architecture][self.itemsize, self.head_dim]

    def __str__(self) -> str:
        return f"{self.architecture}, {self.itemsize} bytes, head dim {self.head_dim}"


class Log:
    """What was found, by what it is of, in a file of JSON lines. What other sources or versions gave is not seen."""

    def __init__(self, path: Path) -> None:
        self._path = path
        source = zlib.crc32(b"".join(path.read_bytes() for path in SOURCES))
        self._prefix = f"{source:08x}, Triton {triton.__version__}, "
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # The last line may have been cut off.
        self._found = dict(json.loads(line) for line in lines if line.endswith("\n"))

    def get(self, of: str) -> Any:
        return self._found.get(self._prefix + of)

    def add(self, of: str, found: Any) -> None:
        self._found[self._prefix + of] = found
        with self._path.open("a") as file:
            file.write(json.dumps([self._prefix + of, found]) + "\n")


def candidates(row: Row) -> Iterator[Configuration]:
    """The configurations worth compiling: those whose tiles may fit into shared memory and registers."""
    nvidia, wide = row.architecture.startswith("sm_"), row.itemsize == 4
    limits = static_gpu.LIMITS[row.architecture]
    for block_m, block_n, warps, stages, registers in itertools.product(
        (16, 32, 64) if wide else (64, 128, 256),
        (16, 32, 64) if wide else (32, 64, 128),
        (4, 8),
        (2, 3, 4) if nvidia and not wide else (1, 2),
        (None, 168, 128) if nvidia and not wide else (None,),
    ):
        shared = (block_m + 2 * stages * block_n) * row.head_dim * row.itemsize
        # Logits and output are in float32, two registers of logits beside each of probabilities.
        per_thread = block_m * (1.5 * block_n + row.head_dim) / ((32 if nvidia else 64) * warps)
        if shared <= limits.shared - limits.reserved_shared and per_thread <= (registers or 255):
            yield Configuration(block_m, block_n, warps, stages, registers)


def make_inputs(row: Row, size: Size, device: torch.device) -> tuple[Tensor, ...]:
    """query, key, value and unit weights, as a recorder hands them over."""
    shape = (size.batch, size.image + size.text, size.width // row.head_dim, row.head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=row.dtype).transpose(1, 2) for _ in range(3))
    return query, key, value, (torch.rand(size.batch, size.text, UNITS, device=device) < 0.1).to(row.dtype)


def prepare(
    row: Row, inputs: tuple[Tensor, ...], image: int, capture: bool, configuration: Configuration
) -> tuple[Tensor, Sequence[Any]]:
    """Output and kernel calls of a forward pass."""
    query, key, value, units = inputs
    scalars = (image, False, row.head_dim**-0.5, (0, len(units)), configuration)
    (out, *_), calls = triton_kernels.prepare(query, key, value, units if capture else None, None, *scalars)
    return out, calls


def examine(row: Row, configuration: Configuration) -> tuple[int, str | None]:
    """Blocks on an SM, and what the static report has against a configuration."""
    inputs, fewest = make_inputs(row, SIZES["S"], torch.device("meta")), 1 << 30
    for capture in (False, True):
        _, calls = prepare(row, inputs, SIZES["S"].image, capture, configuration)
        try:
            report = static_gpu.report("attention", calls[0], row.architecture)
        except Exception as error:
            return 0, f"does not compile: {type(error).__name__}"
        loops = [loop for loop in report.loops if loop.tensor]
        blocks, warps = report.blocks_per_sm, report.blocks_per_sm * report.warps
        if blocks == 0 or report.spills:
            return blocks, "does not fit" if blocks == 0 else "spills"
        if row.architecture == "sm_90" and row.itemsize == 2:
            if not all(opcode.startswith("HGMMA") for loop in loops for opcode in loop.tensor):
                return blocks, "no wgmma"
            if not all(loop.tensor_groups < sum(loop.tensor.values()) for loop in loops):
                return blocks, "each wgmma is waited for"
        if row.architecture.startswith("sm_") and warps < 8:
            return blocks, "too few warps"
        fewest = min(fewest, blocks)
    return fewest, None


def unexamined(rows: Sequence[Row], log: Log, share: int, shares: int) -> list[tuple[Row, Configuration]]:
    """The candidates in one of several shares that have not been examined yet, in order."""
    every = ((row, configuration) for row in rows for configuration in candidates(row))
    own = [pair for pair in every if zlib.crc32(f"{pair}".encode()) % shares == share]
    return [(row, configuration) for row, configuration in own if log.get(f"static, {row}, {configuration}") is None]


def survivors(row: Row, log: Log) -> list[Configuration]:
    """The candidates that nothing is said against; one for each number of blocks that a limit of registers gives."""
    kept: dict[tuple[object, ...], Configuration] = {}
    for configuration in candidates(row):
        blocks, against = log.get(f"static, {row}, {configuration}") or (0, "not examined")
        if against is None:
            kept.setdefault((replace(configuration, max_registers=None), blocks), configuration)
    return list(kept.values())


def prune(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Examine all candidates. Each process has a share; where one dies, its compiler crashed on what it was at."""
    shares = options.workers
    command = [sys.executable, "-m", "bench.tune_attention", *options.arguments, "--architecture", rows[0].architecture]
    while any(unexamined(rows, Log(options.log), i, shares) for i in range(shares)):
        harness.run_apart([[*command, "--examine", str(i)] for i in range(shares)], math.inf)
        log = Log(options.log)
        for i in range(shares):
            for row, configuration in unexamined(rows, log, i, shares)[:1]:
                log.add(f"static, {row}, {configuration}", (0, "crashes the compiler"))


def time_row(row: Row, log: Log, clock: Clock, device: torch.device, sizes: Sizes, budget: float) -> None:
    """Time the survivors; of each and each case the log then has the time over that of the row as it stands."""
    for name, capture in itertools.product(TIMED, (False, True)):
        where = f"time on {harness.device_name(device)}, {row}, {name}{', capture' if capture else ''}, "
        todo = [c for c in survivors(row, log) if c != row.shipped and log.get(f"{where}{c}") is None]
        if todo:
            inputs = make_inputs(row, sizes[name], device)
            query, key, value, _ = inputs
            expected = scaled_dot_product_attention(query, key, value)
        for first in range(0, len(todo), TOGETHER):
            members = [
                Member("shipped", launcher(row, inputs, sizes[name].image, capture, row.shipped)[1], baseline=True)
            ]
            for configuration in todo[first : first + TOGETHER]:
                out, launch = launcher(row, inputs, sizes[name].image, capture, configuration)
                wrong = what_is_wrong(launch, out, expected)
                if wrong is None:
                    members.append(Member(str(configuration), launch))
                else:
                    log.add(f"{where}{configuration}", wrong)
                    expected.sum().item()  # raises where the GPU is lost; the same command goes on after it
            group = measure(members, clock, where, budget)
            for measurement in group.measurements[1:]:
                ratio = group.ratio(measurement.name)
                assert ratio is not None
                log.add(f"{where}{measurement.name}", ratio.median)


def measure(members: Sequence[Member], clock: Clock, name: str, budget: float) -> Group:
    """Time each member for about `budget` seconds, once where that is 0."""
    rounds = 3 if budget else 1
    return harness.measure(members, clock, name=name, budget=budget * len(members), min_rounds=rounds)


def launcher(
    row: Row, inputs: tuple[Tensor, ...], image: int, capture: bool, configuration: Configuration
) -> tuple[Tensor, Callable[[], None]]:
    """A configuration's output, and what writes it."""
    out, calls = prepare(row, inputs, image, capture, configuration)

    def launch() -> None:
        for call in calls:
            call.launch()

    return out, launch


def what_is_wrong(launch: Callable[[], None], out: Tensor, expected: Tensor) -> str | None:
    try:
        launch()
        error = float((out - expected).abs().max() / expected.abs().max())
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}".splitlines()[0]
    return None if error <= LARGEST_ERROR[out.itemsize] else f"relative error {error:.1e}"


def best(row: Row, log: Log, device: torch.device) -> tuple[Configuration, float]:
    """The configuration that takes least of the time of the row as it stands, as a geometric mean over the cases."""
    found = {row.shipped: 1.0}
    for configuration in survivors(row, log):
        cases = (f"{name}{capture}" for name, capture in itertools.product(TIMED, ("", ", capture")))
        where = f"time on {harness.device_name(device)}, {row}"
        ratios = [log.get(f"{where}, {case}, {configuration}") for case in cases]
        if all(isinstance(ratio, float) for ratio in ratios):
            found[configuration] = statistics.geometric_mean(ratios)
    return min(found.items(), key=lambda item: item[1])


def time_implementations(
    row: Row, log: Log, clock: Clock, device: torch.device, sizes: Sizes, budget: float
) -> Iterator[tuple[int, dict[str, float]]]:
    """Milliseconds of a rollout's call and an update's together, by number of keys and implementation."""
    for name, size in sizes.items():
        of = f"implementations on {harness.device_name(device)}, {row}, {row.shipped}, {name}"
        if log.get(of) is None:
            inputs, total = make_inputs(row, size, device), dict.fromkeys(table.IMPLEMENTATIONS, 0.0)
            for part in (_rollout, _update):
                members = [Member(choice, functools.partial(part, size.image, inputs, choice)) for choice in total]
                group = measure(members, clock, of, budget)
                for choice in total:
                    total[choice] += 1e3 * group[choice].median
            log.add(of, total)
        yield size.image + size.text, log.get(of)


def _rollout(image: int, inputs: tuple[Tensor, ...], implementation: str) -> object:
    """The forward pass with capture."""
    query, key, value, units = inputs
    options: dict[str, Any] = {"implementation": implementation, "backend": "triton"}
    return sk.joint_attention(query, key, value, units, num_image_tokens=image, **options)


def _update(image: int, inputs: tuple[Tensor, ...], implementation: str) -> object:
    """Forward and backward without capture."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs[:3])
    options: dict[str, Any] = {"implementation": implementation, "backend": "triton"}
    out, _ = sk.joint_attention(query, key, value, num_image_tokens=image, **options)
    return torch.autograd.grad(out, (query, key, value), torch.ones_like(out))


def write(path: Path, tiles: list[dict[str, Any]], choices: list[dict[str, Any]]) -> None:
    """Put entries into a table, in the place of those that are of the same."""
    content = json.loads(path.read_text())
    names = ("architecture", "itemsize", "head_dim", "num_keys")
    for section, entries in (("tiles", tiles), ("implementations", choices)):
        of = {tuple(entry.get(name) for name in names): entry for entry in content[section] + entries}
        content[section] = list(of.values())
    lines = {key: ",\n  ".join(map(json.dumps, entries)) for key, entries in content.items()}
    path.write_text("{\n" + ",\n".join(f' "{key}": [\n  {text}\n ]' for key, text in lines.items()) + "\n}\n")
    table.load(path)


def tune(row: Row, log: Log, device: torch.device, path: Path, toy: bool) -> None:
    """Fill a row of the table."""
    sizes = TOY_SIZES if toy else SIZES
    clock, budget = harness.clock_for(device), 0.0 if toy else 0.15  # seconds for a member of a group
    time_row(row, log, clock, device, sizes, budget)
    configuration, ratio = best(row, log, device)
    key = {"architecture": row.architecture, "itemsize": row.itemsize, "head_dim": row.head_dim}
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    where = f"{harness.device_name(device)}, {versions}, {datetime.date.today()}"
    print(f"{row}: {configuration} takes {ratio:.3f} of the time of {row.shipped}", flush=True)
    CONFIGURATIONS[row.architecture][row.itemsize, row.head_dim] = configuration
    choices = []
    for num_keys, milliseconds in time_implementations(row, log, clock, device, sizes, budget):
        faster = min(milliseconds, key=lambda name: milliseconds[name])
        print(f"{row}, {num_keys} keys: {faster}, {milliseconds}", flush=True)
        figures = {f"{name}_ms": round(value, 4) for name, value in milliseconds.items()}
        choices.append({**key, "num_keys": num_keys, "implementation": faster, **figures, "source": where})
    write(path, [{**key, **asdict(configuration), "source": where}], choices)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--itemsize", nargs="+", type=int, choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--architecture", choices=CONFIGURATIONS, help="without its GPU: only compile and prune")
    parser.add_argument("--log", type=Path, default=Path("tune_attention.jsonl"), help="default: %(default)s")
    parser.add_argument("--table", type=Path, default=table.PATH, help="the file that is written (default: the table)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--toy", action="store_true", help="two candidates at toy size, uncompiled, on the CPU too")
    parser.add_argument("--examine", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    device = harness.default_device()
    if options.architecture is None:
        if device.type == "cpu" and not options.toy:
            parser.error("PyTorch finds no GPU here; --architecture compiles and prunes for one that is elsewhere")
        options.architecture = table.name_of(device) if device.type == "cuda" else table.architecture_of(device)
        if options.architecture not in CONFIGURATIONS:
            parser.error(
                f"{options.architecture} is new: add it to ARCHITECTURES of star_kernels/_kernel_calls.py and LIMITS "
                "of bench/static_gpu.py, and give it rows in star_kernels/attention/table.json to begin with"
            )
    rows = [Row(options.architecture, *pair) for pair in itertools.product(options.itemsize, options.head_dim)]
    log = Log(options.log)
    if options.examine is not None:
        for row, configuration in unexamined(rows, log, options.examine, options.workers):
            log.add(f"static, {row}, {configuration}", examine(row, configuration))
        return 0
    if options.toy:
        for row in rows:
            for configuration in itertools.islice(candidates(row), 0, None, 99):
                log.add(f"static, {row}, {configuration}", (1, None))
    else:
        prune(options, rows)
        log = Log(options.log)
    for row in rows:
        print(f"{row}: {len(survivors(row, log))} of {sum(1 for _ in candidates(row))} candidates are left", flush=True)
    if not options.toy and (device.type == "cpu" or table.name_of(device) != options.architecture):
        print("timing them needs such a GPU")
        return 0
    for row in rows:
        tune(row, log, device, options.table, options.toy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
