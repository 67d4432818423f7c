"""Machine code as text: its instructions, the loops among them, and which unit of the GPU an instruction keeps busy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = ("tensor", "special", "global", "shared", "local", "shuffle", "barrier", "float", "other")

# The first pattern that matches the start of an opcode decides. NVIDIA's names are upper case, AMD's lower case.
# "local" is what spilled registers travel through.
_KIND_OF_OPCODE = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"(HG|QG|IG|H|I|Q|D|O)MMA\b|UTC[A-Z]*MMA|v_s?mfma", "tensor"),
        (r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_", "special"),
        (r"(LDL|STL)\b|scratch_", "local"),
        (r"LDGDEPBAR|DEPBAR|BAR\b|SYNCS|UTCBAR|UCGABAR|WARPSYNC|WARPGROUP|FENCE|MEMBAR|ERRBAR|CCTL", "barrier"),
        (r"s_barrier|s_waitcnt|buffer_(wbl2|inv)", "barrier"),
        (r"(LDG|STG|LDGSTS|LD|ST|RED|ATOM|ATOMG)\b|UTMA|UBLK|buffer_|global_|flat_", "global"),
        (r"ds_(b?permute|swizzle)|(SHFL|REDUX)\b", "shuffle"),
        (r"(LDS|STS|LDSM|STSM|ATOMS|LDTM|STTM)\b|UTCCP|ds_", "shared"),
        (r"F(FMA|ADD|MUL|MNMX|SETP|SEL|SET|CHK)|HFMA2|HADD2|HMUL2|HMNMX2|F2F", "float"),
        (
            r"v_(pk_)?(fma|fmac|mad|add|sub|subrev|mul|max3?|min3?|cvt|cmp_\w+|ldexp|perm)_(b?f16|b?f32|pk_b?f16)",
            "float",
        ),
    )
)


_ACCESS = re.compile(
    r"(?:LDG|STG|LDGSTS|LD|ST)\b(?:\.(?!(?:[US]8|[US]16|64|128)\b)\w+)*(?:\.(?P<sass>[US]8|[US]16|64|128)\b)?"
    r"|(?:buffer|global|flat)_(?:load|store)_(?P<gcn>[us]?byte|[us]?short|dword(?:x[234])?)"
)
_WIDTHS = {
    **{"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16},
    **{"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2},
    **{"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16},
}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its modifiers, ``HGMMA.64x64x16.F32.BF16``.
        text: the whole of it, without address and comments.
        labels: that stand before it.
        lines: its place in the source, ``file:line``, of the function it was inlined from, then of that one's callers.
        target: the label that it may jump to.
        falls_through: whether the next instruction may follow it.
    """

    opcode: str
    text: str
    labels: tuple[str, ...]
    lines: tuple[str, ...]
    target: str | None
    falls_through: bool

    @property
    def kind(self) -> str:
        if self.text.startswith("@!PT "):  # Never executed: ptxas keeps instructions apart with it.
            return "other"
        return next((kind for pattern, kind in _KIND_OF_OPCODE if pattern.match(self.opcode)), "other")

    @property
    def global_bytes(self) -> int:
        """What one thread moves from or to global memory; 0 for asynchronous copies of whole tiles."""
        found = _ACCESS.match(self.opcode) if self.kind == "global" else None
        if found is None:
            return 0
        width = found["sass"] or found["gcn"]
        return _WIDTHS[width] if width else 4


@dataclass(frozen=True)
class Loop:
    """A loop without the loops inside it, its instructions in the order of the code."""

    depth: int
    instructions: tuple[Instruction, ...]


def count(instructions: Iterable[Instruction]) -> Counter[str]:
    """How many instructions there are of each of `KINDS`."""
    return Counter(instruction.kind for instruction in instructions)


_LABEL = re.compile(r"^([.A-Za-z_][\w.$]*):")
_SASS_LINE = re.compile(r'^\s*//## File "([^"]*)", line (\d+)')
_SASS_CODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*);")
_SASS_JUMPS = ("BRA", "JMP", "BRX", "JMX", "EXIT", "RET", "BSYNC", "KILL")


def parse_sass(text: str) -> list[Instruction]:
    """Instructions of ``nvdisasm -c -gi``."""
    instructions: list[Instruction] = []
    labels: list[str] = []
    lines: list[str] = []
    place: tuple[str, ...] = ()
    meeting_points: dict[str, str] = {}
    for row in text.splitlines():
        if found := _SASS_LINE.match(row):
            lines.append(f"{found[1].rpartition('/')[2]}:{found[2]}")
            continue
        if found := _LABEL.match(row):
            labels.append(found[1])
            continue
        found = _SASS_CODE.match(row)
        if found is None:
            continue
        predicate, opcode, operands = found.groups()
        name = opcode.partition(".")[0]
        label = re.search(r"`\(([.\w$]+)\)", operands)
        target = label[1] if label else None
        # The detour of BRA.DIV is for warps whose threads have parted; it comes back to the next instruction.
        jumps = name in _SASS_JUMPS and ".DIV" not in opcode
        if name == "BSSY" and target is not None:
            meeting_points[operands.partition(",")[0]] = target
        if name == "BSYNC":
            target = meeting_points.get(operands.strip())
        elif not jumps and name != "CALL":
            target = None
        conditional = predicate is not None or re.match(r"!?U?P\d", operands) is not None
        place = tuple(lines) or place
        instructions.append(
            Instruction(
                opcode,
                " ".join(part for part in (predicate, opcode, operands.strip()) if part),
                tuple(labels),
                place,
                target,
                conditional or not jumps,
            )
        )
        labels, lines = [], []
    return instructions


_GCN_LINE = re.compile(r"^\s*\.loc\s.*?;\s*(.*)")
_GCN_CODE = re.compile(r"^\s+([a-z][a-z0-9]*_\w+)\s*([^;/]*)")


def parse_amdgcn(text: str) -> list[Instruction]:
    """Instructions of the assembly that LLVM writes for AMD."""
    instructions: list[Instruction] = []
    labels: list[str] = []
    place: tuple[str, ...] = ()
    for row in text.splitlines():
        if row.startswith(".Lfunc_end"):
            break
        if found := _GCN_LINE.match(row):
            place = tuple(re.findall(r"([^\s@\[]+:\d+):\d+", found[1]))
        elif found := _LABEL.match(row):
            labels.append(found[1])
        elif found := _GCN_CODE.match(row):
            opcode, operands = found[1], found[2].strip()
            branch = opcode.startswith(("s_branch", "s_cbranch"))
            instructions.append(
                Instruction(
                    opcode,
                    f"{opcode} {operands}".strip(),
                    tuple(labels),
                    place,
                    operands if branch else None,
                    not opcode.startswith(("s_branch", "s_endpgm", "s_setpc")),
                )
            )
            labels = []
    return instructions


def find_loops(instructions: list[Instruction]) -> list[Loop]:
    """The natural loops that can be reached, by where they begin; those with one header are one loop."""
    blocks, successors = _control_flow(instructions)
    reached = _reached(successors)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block in reached:
        for successor in successors[block]:
            predecessors[successor].append(block)
    dominators = _dominators(reached, predecessors)

    bodies: dict[int, set[int]] = {}
    for block in reached:
        for header in successors[block]:
            if header in dominators[block]:
                bodies.setdefault(header, {header}).update(_natural_loop(header, block, predecessors))
    loops = []
    for header in sorted(bodies):
        inner = set().union(*(body for other, body in bodies.items() if other != header and other in bodies[header]))
        own = [block for block in sorted(bodies[header]) if block not in inner]
        depth = sum(header in body for body in bodies.values())
        loops.append(Loop(depth, tuple(instructions[i] for block in own for i in blocks[block])))
    return loops


def _control_flow(instructions: list[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks as ranges of instructions, and the blocks that may follow each."""
    starts = {0} | {i for i, instruction in enumerate(instructions) if instruction.labels}
    for i, instruction in enumerate(instructions[:-1]):
        if instruction.target is not None or not instruction.falls_through:
            starts.add(i + 1)
    bounds = [*sorted(starts), len(instructions)]
    blocks = [range(first, end) for first, end in zip(bounds, bounds[1:], strict=False)]
    block_of_label = {label: b for b, block in enumerate(blocks) for label in instructions[block[0]].labels}
    successors = []
    for b, block in enumerate(blocks):
        last = instructions[block[-1]]
        following = [b + 1] if last.falls_through and b + 1 < len(blocks) else []
        if last.target in block_of_label:
            following.append(block_of_label[last.target])
        successors.append(following)
    return blocks, successors


def _reached(successors: list[list[int]]) -> list[int]:
    order, seen, pending = [], {0}, [0]
    while pending:
        order.append(pending.pop())
        new = [successor for successor in successors[order[-1]] if successor not in seen]
        seen.update(new)
        pending.extend(new)
    return order


def _dominators(reached: list[int], predecessors: list[list[int]]) -> dict[int, set[int]]:
    """For each block that the first one reaches, the blocks that every path to it passes."""
    dominators = {block: set(reached) for block in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in reached[1:]:
            common = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators


def _natural_loop(header: int, latch: int, predecessors: list[list[int]]) -> set[int]:
    body, pending = {header}, [latch]
    while pending:
        block = pending.pop()
        if block not in body:
            body.add(block)
            pending.extend(predecessors[block])
    return body
