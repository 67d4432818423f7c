"""The least work that each operator can do, and the time that an H100 takes for it at best.

Per call: bytes that have to move, operations of the tensor cores and exponentials, and the time that each implies.
From the reports of `bench.static_gpu`: how the attention kernel's loop over image keys divides the clock cycles of an
SM, and what the other kernels request of memory. ``python -m bench.static_gpu`` prints all of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.attention_cases import Shape, flux, sd35_medium

if TYPE_CHECKING:
    from bench.static_gpu import KernelReport, LoopReport

# Iterations of a kernel's loop with the arguments that it was compiled for, where that is not one; 0: left out, as it
# only adds up what another kernel left, or runs only where a gradient has to be scaled.
TRIPS = {"mean over heads": 24 // 8, "mask": 64 * 64 // 2048, "metrics": 0, "scale": 0}
SHAPES = {"S": sd35_medium("S", batch=8), "L": sd35_medium("L", batch=8), "F": flux(batch=8)}
TENSOR_TILE = 16  # columns of the narrowest tensor-core product: K units occupy as many


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU; those of an SM per clock cycle.

    The H100 SXM's data sheet gives 1,979 TFLOP/s for bfloat16 with sparsity, half of it without, and 3.35 TB/s; the
    architecture's white paper 132 SMs with four tensor cores of 512 fused multiply-adds. The clock is the one at which
    these two agree. The CUDA programming guide's table of arithmetic throughput gives the exponentials per cycle.
    """

    name: str
    bytes_per_second: float
    tensor_operations_per_second: float
    sms: int
    tensor_operations_per_cycle: int
    exponentials_per_cycle: int
    warp_instructions_per_cycle: int

    @property
    def clock(self) -> float:
        return self.tensor_operations_per_second / self.sms / self.tensor_operations_per_cycle

    @property
    def exponentials_per_second(self) -> float:
        return self.sms * self.exponentials_per_cycle * self.clock


H100 = Machine("H100 SXM", 3.35e12, 1979e12 / 2, 132, 4 * 512 * 2, 16, 4)


@dataclass(frozen=True)
class Work:
    """What one call cannot avoid: every input read once, every output written once, the products and exponentials."""

    name: str
    bytes: int
    tensor_operations: int = 0
    exponentials: int = 0

    def seconds(self, machine: Machine) -> dict[str, float]:
        """The time that each resource needs by itself; the longest is the floor of the call."""
        return {
            "memory": self.bytes / machine.bytes_per_second,
            "tensor cores": self.tensor_operations / machine.tensor_operations_per_second,
            "exponentials": self.exponentials / machine.exponentials_per_second,
        }


def attention(shape: Shape, *, capture: bool, itemsize: int = 2) -> Work:
    """The forward pass; capture reads the unit weights and writes one mass per head, in float32."""
    rows = shape.batch * shape.heads
    pairs = rows * shape.tokens**2
    moved = 4 * rows * shape.tokens * shape.head_dim * itemsize + 4 * rows * shape.tokens
    operations = 4 * pairs * shape.head_dim
    if not capture:
        return Work(f"attention, {shape.name}", moved, operations, pairs)
    moved += 4 * shape.batch * shape.text * shape.units + 4 * rows * shape.image * shape.units
    operations += 2 * rows * shape.image * shape.text * _columns(shape.units)
    return Work(f"attention with capture, {shape.name}", moved, operations, pairs)


def mean_over_heads(shape: Shape) -> Work:
    masses = shape.batch * shape.image * shape.units
    return Work(f"mean over heads, {shape.name}", 4 * masses * (shape.heads + 1))


def attention_mass(shape: Shape, itemsize: int = 2) -> Work:
    """M from the image rows' log-sum-exp: image queries, text keys and unit weights in, M out.

    T is the same on image keys and text queries, with the log-sum-exp of the fewer text rows.
    """
    rows = shape.batch * shape.heads
    pairs = rows * shape.image * shape.text
    moved = rows * shape.tokens * shape.head_dim * itemsize + 4 * rows * shape.image
    moved += 4 * shape.batch * (shape.text + shape.image) * shape.units
    return Work(f"attention mass, {shape.name}", moved, 2 * pairs * (shape.head_dim + _columns(shape.units)), pairs)


def _columns(units: int) -> int:
    return (units + TENSOR_TILE - 1) // TENSOR_TILE * TENSOR_TILE


@dataclass(frozen=True)
class Latents:
    """[B, C, H, W], the model's outputs in bfloat16, everything else in float32; K units over (H/2)·(W/2) tokens."""

    batch: int
    channels: int = 16
    height: int = 64
    width: int = 64
    units: int = 8

    @property
    def positions(self) -> int:
        return self.batch * self.height * self.width

    @property
    def elements(self) -> int:
        return self.positions * self.channels

    @property
    def tokens(self) -> int:
        return self.positions // 4

    def __str__(self) -> str:
        return f"[{self.batch}, {self.channels}, {self.height}, {self.width}]"


def policy_loss(latents: Latents, *, kl: bool = False) -> Work:
    """Velocity, sample, next sample, old log-probs and weights in, gradient out; with KL the reference velocity too."""
    moved = latents.elements * (2 + 4 + 4 + 2 + (2 if kl else 0)) + 4 * latents.positions + 4 * latents.tokens
    return Work(f"policy loss{' with KL' if kl else ''}, {latents}", moved, exponentials=latents.positions)


def transition_step(latents: Latents) -> Work:
    """Two velocities (guidance), sample and noise in, next sample and log-probs out."""
    return Work(f"transition step, {latents}", latents.elements * (2 + 2 + 4 + 4 + 4) + 4 * latents.positions)


def allocation_map(latents: Latents) -> Work:
    return Work(f"allocation map, {latents}", 4 * latents.tokens * (latents.units + 1))


def works() -> list[Work]:
    """The rows of the table: S and L of SD3.5-medium, F of FLUX.1, and latents of a group and of large batches."""
    shapes = SHAPES.values()
    latents = [Latents(9), Latents(64), Latents(256)]
    return [
        *(
            work
            for shape in shapes
            for work in (
                attention(shape, capture=False),
                attention(shape, capture=True),
                mean_over_heads(shape),
                attention_mass(shape),
            )
        ),
        *(policy_loss(size, kl=kl) for kl in (False, True) for size in latents),
        *(transition_step(size) for size in latents),
        *(allocation_map(size) for size in latents),
    ]


def loop_cycles(kernel: KernelReport, loop: LoopReport, machine: Machine) -> dict[str, float]:
    """Clock cycles of an SM for one iteration of a loop by a block of Hopper warps, by each resource by itself."""
    multiply_adds = 0
    for opcode, times in loop.tensor.items():
        rows, columns, depth = (int(size) for size in re.fullmatch(r"HGMMA\.(\d+)x(\d+)x(\d+)\..*", opcode).groups())  # type: ignore[union-attr]
        multiply_adds += times * rows * columns * depth * kernel.warps // 4  # A warp group of four executes it.
    return {
        "tensor cores": 2 * multiply_adds / machine.tensor_operations_per_cycle,
        "exponentials": loop.kinds["special"] * kernel.warps * 32 / machine.exponentials_per_cycle,
        "issue": loop.instructions * kernel.warps / machine.warp_instructions_per_cycle,
    }


def attainable(cycles: dict[str, float], machine: Machine) -> tuple[float, float]:
    """Operations per second where the tensor cores work side by side with all else, and where they take turns."""
    operations = cycles["tensor cores"] * machine.tensor_operations_per_cycle * machine.sms * machine.clock
    rest = max(cycles["exponentials"], cycles["issue"])
    return operations / max(cycles["tensor cores"], rest), operations / (cycles["tensor cores"] + rest)


def work_table(machine: Machine) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("call", "MB", "GFLOP", "exp2 / 1e6", "memory", "tensor cores", "exp2", "floor", "bound by")
    ]
    for work in works():
        seconds = work.seconds(machine)
        bound = max(seconds, key=lambda name: seconds[name])
        rows.append(
            (
                work.name,
                f"{work.bytes / 1e6:.1f}",
                f"{work.tensor_operations / 1e9:.1f}" if work.tensor_operations else "",
                f"{work.exponentials / 1e6:.1f}" if work.exponentials else "",
                *(f"{time * 1e6:.1f} µs" if time else "" for time in seconds.values()),
                f"{seconds[bound] * 1e6:.1f} µs",
                bound,
            )
        )
    return rows


def cycles_table(reports: list[KernelReport], machine: Machine) -> list[tuple[str, ...]]:
    """Of the loop over image keys of each attention call, and the rates of a kernel that did nothing else."""
    rows: list[tuple[str, ...]] = [
        ("call on sm_90", "blocks/SM", "instructions", "tensor cores", "exp2", "issue", "side by side", "taking turns")
    ]
    for kernel in reports:
        for loop in kernel.loops:
            if kernel.architecture == "sm_90" and loop.name == "image keys" and loop.tensor:
                cycles = loop_cycles(kernel, loop, machine)
                rows.append(
                    (
                        kernel.name,
                        str(kernel.blocks_per_sm),
                        str(loop.instructions),
                        *(f"{count:.0f}" for count in cycles.values()),
                        *(f"{rate / 1e12:.0f} TFLOP/s" for rate in attainable(cycles, machine)),
                    )
                )
    return rows


def mass_microseconds(kernel: KernelReport, shape: Shape, machine: Machine) -> tuple[float, float]:
    """The mass from the log-sum-exp by a kernel, and its mean over groups of heads: side by side, and taking turns.

    As long as the busiest SM computes: its programs are as many as any SM has, and each group of heads as large as any.
    """
    tiles = {name: kernel.settings[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")}
    groups, unit_blocks = math.ceil(shape.heads / tiles["GROUP"]), math.ceil(shape.units / tiles["BLOCK_K"])
    programs = math.ceil(shape.image / tiles["BLOCK_M"]) * unit_blocks * groups * shape.batch
    (heads,) = (loop for loop in kernel.loops if loop.depth == 1 and not loop.tensor)
    (text,) = (loop for loop in kernel.loops if loop.tensor)
    cycles = loop_cycles(kernel, text, machine)
    rest = max(cycles["exponentials"], cycles["issue"])
    trips = math.ceil(programs / machine.sms) * tiles["GROUP"]
    outside = heads.instructions * kernel.warps / machine.warp_instructions_per_cycle
    slots = 4 * shape.batch * shape.image * shape.units * (groups + 1) / machine.bytes_per_second
    side_by_side, taking_turns = (
        trips * (math.ceil(shape.text / tiles["BLOCK_N"]) * tile + outside) / machine.clock + slots
        for tile in (max(cycles["tensor cores"], rest), cycles["tensor cores"] + rest)
    )
    return 1e6 * side_by_side, 1e6 * taking_turns


def mass_shapes(kernel: KernelReport) -> list[Shape]:
    """Those of `SHAPES` that `kernel` computes the mass of, in bfloat16 on Hopper, none if it is another kernel."""
    found = re.match(r"mass from log-sum-exp, .*, bfloat16, head dim (\d+), 8 units$", kernel.name)
    if found is None or kernel.architecture != "sm_90":
        return []
    return [shape for shape in SHAPES.values() if shape.head_dim == int(found[1])]


def mass_table(reports: list[KernelReport], machine: Machine) -> list[tuple[str, ...]]:
    """The mass from the log-sum-exp against its floor."""
    rows: list[tuple[str, ...]] = [("call on sm_90", "shape", "blocks/SM", "floor", "side by side", "taking turns")]
    for kernel in reports:
        for shape in mass_shapes(kernel):
            floor = 1e6 * max(attention_mass(shape).seconds(machine).values())
            times = (f"{time:.1f} µs, {time / floor:.2f}" for time in mass_microseconds(kernel, shape, machine))
            name = kernel.name.removeprefix("mass from log-sum-exp, ")
            rows.append((name, shape.name, str(kernel.blocks_per_sm), f"{floor:.1f} µs", *times))
    return rows


def traffic_table(reports: list[KernelReport], machine: Machine) -> list[tuple[str, ...]]:
    """What the kernels without matrix products ask of memory, beside the tensors that they are given."""
    rows: list[tuple[str, ...]] = [
        ("call on sm_90", "programs", "tensors", "requested", "ratio", "memory", "issue", "blocks/SM")
    ]
    for kernel in reports:
        trips = TRIPS.get(kernel.name, 1)
        if kernel.architecture != "sm_90" or trips == 0 or (kernel.operator == "attention" and trips == 1):
            continue
        again = trips - 1
        threads = kernel.programs * kernel.warps * 32
        requested = threads * (kernel.global_bytes + again * sum(loop.global_bytes for loop in kernel.loops))
        executed = kernel.instructions + again * sum(loop.instructions for loop in kernel.loops)
        programs_of_an_sm = math.ceil(kernel.programs / machine.sms)
        cycles = programs_of_an_sm * kernel.warps * executed / machine.warp_instructions_per_cycle
        rows.append(
            (
                f"{kernel.operator}: {kernel.name}",
                str(kernel.programs),
                f"{kernel.tensor_bytes / 1e6:.2f} MB",
                f"{requested / 1e6:.2f} MB",
                f"{requested / kernel.tensor_bytes:.2f}",
                f"{kernel.tensor_bytes / machine.bytes_per_second * 1e6:.2f} µs",
                f"{cycles / machine.clock * 1e6:.2f} µs",
                str(kernel.blocks_per_sm),
            )
        )
    return rows
