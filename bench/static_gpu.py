"""What the compilers make of the Triton kernels, read from the machine code: no GPU is needed.

``python -m bench.static_gpu`` compiles every call that the operators list (``ahead_of_time_calls`` in their
``triton_kernels.py``, one per row of their configuration tables) for its architecture with the installed Triton, prints
tables, and writes what it read to ``bench/results/static_gpu.json``. Per call: registers, what is spilled, shared
memory and how many blocks an SM holds. Per loop: instructions by the unit that they keep busy. Beside them stand the
floors of `bench.roofline` and what follows from both. docs/kernels.md says what to make of it.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import roofline
from bench.disassembly import KINDS, Instruction, Loop, count, find_loops, parse_amdgcn, parse_sass

OPERATORS = ("attention", "allocation", "transition", "policy_loss")
MEASURED = ("tensor", "special", "global", "shared", "local")  # what capture must not add to the loop over image keys
REPORT = Path(__file__).parent / "results" / "static_gpu.json"
SCRATCH = ("partials", "scratch")  # arguments that hold what a kernel leaves for the next one or for itself


@dataclass(frozen=True)
class Limits:
    """What one SM (compute unit) holds.

    NVIDIA's are those of the table of technical specifications per compute capability in the CUDA programming guide,
    with the units of allocation of its occupancy calculator; each block occupies 1 KiB of shared memory beyond its own.
    AMD's are those of the CDNA 3 instruction set guide and LLVM's AMDGPU backend: 4 SIMDs, each with 512 vector
    registers per lane and up to 8 waves.

    Attributes:
        shared, reserved_shared: bytes, and those that each block takes beyond what it asks for.
        warps, blocks: how many may be resident.
        registers, register_unit: per lane, of all resident warps together, and the unit they are handed out in.
        tensor_memory_columns: of Blackwell's tensor memory.
    """

    shared: int
    reserved_shared: int
    warps: int
    blocks: int
    registers: int
    register_unit: int
    tensor_memory_columns: int = 0


LIMITS = {
    "sm_80": Limits(164 << 10, 1 << 10, 64, 32, 65536 // 32, 8),
    "sm_90": Limits(228 << 10, 1 << 10, 64, 32, 65536 // 32, 8),
    "sm_100": Limits(228 << 10, 1 << 10, 64, 32, 65536 // 32, 8, tensor_memory_columns=512),
    "gfx942": Limits(64 << 10, 0, 32, 32, 4 * 512, 8),
}


@dataclass(frozen=True)
class LoopReport:
    """A loop, without the loops inside it.

    Attributes:
        name: "image keys" or "text keys" where the kernel has both, otherwise the place in the source.
        instructions, kinds: per warp and iteration, in all and by `disassembly.KINDS`.
        tensor: tensor-core instructions by opcode.
        tensor_groups: batches in which the tensor-core instructions of Hopper are waited for. As many as there are
            instructions means that ptxas has serialised them.
        global_bytes: that a thread moves from and to global memory in an iteration.
    """

    name: str
    depth: int
    instructions: int
    kinds: dict[str, int]
    tensor: dict[str, int]
    tensor_groups: int
    global_bytes: int


@dataclass(frozen=True)
class KernelReport:
    """One compiled call; sizes in bytes, registers per thread.

    Attributes:
        settings: what the code chose: launch options, tile sizes and other constants.
        programs: of the call, with the arguments that were compiled for.
        tensor_bytes: of the tensors among these arguments, scratch left out.
        global_bytes: that a thread moves from and to global memory if it executes every instruction once.
    """

    operator: str
    name: str
    architecture: str
    kernel: str
    settings: dict[str, Any]
    programs: int
    tensor_bytes: int
    warps: int
    stages: int
    registers: int
    stack: int
    spill_instructions: int
    shared: int
    tensor_memory_columns: int
    blocks_per_sm: int
    blocks_limited_by: str
    instructions: int
    kinds: dict[str, int]
    tensor: dict[str, int]
    global_bytes: int
    loops: list[LoopReport]

    @property
    def spills(self) -> bool:
        """Not by the stack: ptxas can set some aside and then leave it alone."""
        return self.spill_instructions > 0


def blocks_per_sm(limits: Limits, warps: int, registers: int, shared: int, columns: int = 0) -> tuple[int, str]:
    """How many blocks fit on an SM, and what runs out first. `registers` are those of one thread."""
    unit = limits.register_unit
    registers_per_warp = max(unit, (registers + unit - 1) // unit * unit)
    warps_by_registers = limits.registers // registers_per_warp // 4 * 4  # A warp belongs to one of four schedulers.
    fits = {
        "registers": warps_by_registers // warps,
        "shared memory": limits.shared // max(1, shared + limits.reserved_shared),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    if columns > 0:
        fits["tensor memory"] = limits.tensor_memory_columns // columns
    reason = min(fits, key=lambda name: fits[name])
    return fits[reason], reason


def calls(operators: Iterable[str], architecture: str) -> Iterator[tuple[str, Any]]:
    """(operator, call) for each kernel call that the operators list."""
    for operator in operators:
        if importlib.util.find_spec(f"star_kernels.{operator}.triton_kernels") is not None:
            module = importlib.import_module(f"star_kernels.{operator}.triton_kernels")
            yield from ((operator, call) for call in module.ahead_of_time_calls(architecture))


def settings(call: Any) -> dict[str, Any]:
    """What the operator chose for `call`, as it can be written to JSON: launch options and constants."""
    chosen = call.options | {name: value for name, value in call.arguments.items() if name.isupper()}
    return {name: value if isinstance(value, bool | int) else str(value) for name, value in sorted(chosen.items())}


def _tensors(value: object) -> Iterator[Any]:
    """The tensors in nested tuples."""
    if isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "element_size"):
        yield value


def _tensor_bytes(call: Any) -> int:
    kept = tuple(value for name, value in call.arguments.items() if name not in SCRATCH)
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in _tensors(kept)}.values())


def report(operator: str, call: Any, architecture: str) -> KernelReport:
    """Compile `call` for `architecture` and read the result."""
    compiled = call.compile(architecture)
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        instructions = parse_amdgcn(text)
        registers, stack = _amd_field(text, "vgpr_count"), _amd_field(text, "private_segment_fixed_size")
        spills = _amd_field(text, "vgpr_spill_count") + _amd_field(text, "sgpr_spill_count")
        spills += count(instructions)["local"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            instructions = parse_sass(_nvidia_tool("nvdisasm", "-c", "-gi", file.name))
            usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
        spills = count(instructions)["local"]
    metadata = compiled.metadata
    columns = getattr(metadata, "tmem_size", None) or 0
    blocks, reason = blocks_per_sm(LIMITS[architecture], metadata.num_warps, registers, metadata.shared, columns)
    return KernelReport(
        operator,
        call.name,
        architecture,
        metadata.name,
        settings(call),
        math.prod(call.grid),
        _tensor_bytes(call),
        metadata.num_warps,
        metadata.num_stages,
        registers,
        stack,
        spills,
        metadata.shared,
        columns,
        blocks,
        reason,
        len(instructions),
        _kinds(instructions),
        _tensor(instructions),
        _global_bytes(instructions),
        _loops(call.kernel, find_loops(instructions)),
    )


def _amd_field(text: str, name: str) -> int:
    found = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the assembly has no field .{name} in its metadata")
    return int(found[1])


def _nvidia_tool(name: str, *arguments: str) -> str:
    """Run a tool of the Triton wheel that is imported, so that it fits that wheel's ptxas."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _kinds(instructions: Iterable[Instruction]) -> dict[str, int]:
    counts = count(instructions)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _tensor(instructions: Iterable[Instruction]) -> dict[str, int]:
    return dict(sorted(Counter(i.opcode for i in instructions if i.kind == "tensor").items()))


def _global_bytes(instructions: Iterable[Instruction]) -> int:
    return sum(instruction.global_bytes for instruction in instructions)


def _loops(kernel: Any, loops: list[Loop]) -> list[LoopReport]:
    """Reports of the loops that compute; those that wait for a barrier, a handful of instructions, are left out."""
    reports = []
    for loop in loops:
        kinds = _kinds(loop.instructions)
        if kinds.keys() <= {"barrier", "other"}:
            continue
        groups = sum(i.kind == "tensor" and "gsb" in i.text for i in loop.instructions)
        name = _loop_name(kernel, loop)
        reports.append(
            LoopReport(
                name,
                loop.depth,
                len(loop.instructions),
                kinds,
                _tensor(loop.instructions),
                groups,
                _global_bytes(loop.instructions),
            )
        )
    return reports


def _loop_name(kernel: Any, loop: Loop) -> str:
    """By the statement of the kernel that the loop was inlined into, as far as the line information goes."""
    places = Counter(instruction.lines[-1] for instruction in loop.instructions if instruction.lines)
    if not places:
        return "loop"
    place = places.most_common(1)[0][0]
    file, _, line = place.rpartition(":")
    path = Path(kernel.fn.__code__.co_filename)
    if file == path.name:
        statement = next((text for lines, text in _statements(path) if int(line) in lines), "")
        sides = [side for side in ("image", "text") if side in statement]
        if len(sides) == 1:
            return f"{sides[0]} keys"
    return place


@functools.cache
def _statements(path: Path) -> list[tuple[range, str]]:
    """The statements of a file that have no body: their lines and their text in lower case."""
    source = path.read_text()
    lines = source.lower().splitlines()
    return [
        (range(node.lineno, (node.end_lineno or node.lineno) + 1), "\n".join(lines[node.lineno - 1 : node.end_lineno]))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and not hasattr(node, "body")
    ]


def calls_table(reports: Iterable[KernelReport]) -> list[tuple[object, ...]]:
    header = (
        "architecture",
        "operator",
        "call",
        "warps",
        "stages",
        "registers",
        "spills",
        "shared",
        "blocks/SM",
        "limit",
    )
    return [
        header,
        *(
            (
                r.architecture,
                r.operator,
                r.name,
                r.warps,
                r.stages,
                r.registers,
                f"{r.stack} B, {r.spill_instructions}" if r.spills else "none",
                r.shared,
                r.blocks_per_sm,
                r.blocks_limited_by,
            )
            for r in reports
        ),
    ]


def loops_table(reports: Iterable[KernelReport]) -> list[tuple[object, ...]]:
    return [
        ("architecture", "operator", "call", "loop", "instructions", *KINDS, "tensor opcodes", "groups"),
        *(
            (
                r.architecture,
                r.operator,
                r.name,
                loop.name,
                loop.instructions,
                *(loop.kinds.get(kind, 0) for kind in KINDS),
                ", ".join(f"{n} {opcode}" for opcode, n in loop.tensor.items()) or "none",
                loop.tensor_groups or "",
            )
            for r in reports
            for loop in r.loops
        ),
    ]


def capture_pairs(reports: Iterable[KernelReport]) -> list[tuple[KernelReport, KernelReport]]:
    """Attention without and with capture that is otherwise the same."""
    by_name = {(r.architecture, r.name): r for r in reports}
    return [
        (by_name[architecture, re.sub(r", \d+ units$", ", no capture", name)], capturing)
        for (architecture, name), capturing in by_name.items()
        if re.match(r"forward, .*, \d+ units$", name)
    ]


def image_loop(report: KernelReport) -> LoopReport:
    """The loop over image keys: by its name, or where line information does not tell, the first with exponentials."""
    named = [loop for loop in report.loops if loop.name == "image keys"]
    return (named or [loop for loop in report.loops if "special" in loop.kinds])[0]


def capture_table(reports: Iterable[KernelReport]) -> list[tuple[object, ...]]:
    """What capture changes: each cell gives the value without and with it."""
    rows: list[tuple[object, ...]] = [
        ("architecture", "call", "registers", "blocks/SM", "image-key loop", *(f"of these {kind}" for kind in MEASURED))
    ]
    for plain, capturing in capture_pairs(reports):
        loops = image_loop(plain), image_loop(capturing)
        rows.append(
            (
                plain.architecture,
                plain.name.removesuffix(", no capture"),
                f"{plain.registers} / {capturing.registers}",
                f"{plain.blocks_per_sm} / {capturing.blocks_per_sm}",
                " / ".join(str(loop.instructions) for loop in loops),
                *(" / ".join(str(loop.kinds.get(kind, 0)) for loop in loops) for kind in MEASURED),
            )
        )
    return rows


def markdown(rows: Sequence[tuple[object, ...]]) -> str:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def load(path: Path) -> list[KernelReport]:
    """The reports that `main` wrote."""
    kernels = json.loads(path.read_text())["kernels"]
    return [KernelReport(**kernel | {"loops": [LoopReport(**loop) for loop in kernel["loops"]]}) for kernel in kernels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--operator", nargs="+", default=OPERATORS)
    parser.add_argument("--call", default="", help="only calls whose name matches this regular expression")
    parser.add_argument("--json", type=Path, default=REPORT, help="where to write the reports (default: %(default)s)")
    arguments = parser.parse_args()

    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        import triton

        reports = [
            report(operator, call, architecture)
            for architecture in arguments.architecture
            for operator, call in calls(arguments.operator, architecture)
            if re.search(arguments.call, call.name)
        ]
    print(f"Triton {triton.__version__}")
    machine = roofline.H100
    tables: dict[str, Sequence[tuple[object, ...]]] = {
        f"Floors, {machine.name} at {machine.clock / 1e9:.2f} GHz": roofline.work_table(machine),
        "Calls": calls_table(reports),
        "Loops, instructions per warp and iteration": loops_table(reports),
        "Attention without / with capture": capture_table(reports),
        f"Cycles of an SM per iteration over image keys, {machine.name}": roofline.cycles_table(reports, machine),
        f"Mass from the log-sum-exp, times and times the floor, {machine.name}": roofline.mass_table(reports, machine),
        f"Memory traffic, {machine.name}": roofline.traffic_table(reports, machine),
    }
    for title, rows in tables.items():
        if len(rows) > 1:
            print(f"\n{title}\n\n{markdown(rows)}")
    content = {"triton": triton.__version__, "limits": LIMITS, "kernels": reports}
    arguments.json.write_text(json.dumps(content, indent=1, default=asdict) + "\n")
    if any(r.spills for r in reports):
        sys.exit("some calls spill registers")


if __name__ == "__main__":
    main()
