"""The readers of machine code, on code written for them. What they find in the kernels: test_ahead_of_time.py."""

from __future__ import annotations

import pytest

from bench.disassembly import Instruction, count, find_loops, parse_amdgcn, parse_sass
from bench.static_gpu import LIMITS, blocks_per_sm

# A loop over tiles around a loop of tensor-core instructions, which waits for its operands out of line.
SASS = """
kernel:
.text.kernel:
	//## File "/somewhere/kernel.py", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_0:
	//## File "/somewhere/kernel.py", line 5
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/                   BSSY B0, `(.L_x_1) ;
        /*0040*/               @P3 BRA `(.L_x_8) ;
        /*0050*/                   BSYNC B0 ;
.L_x_1:
	//## File "/somewhere/helper.py", line 40 inlined at "/somewhere/kernel.py", line 6
	//## File "/somewhere/kernel.py", line 6
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR19], R8 ;
        /*0070*/              @!P1 BRA `(.L_x_7) ;
.L_x_2:
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, R160, gdesc[UR12], R24 ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, R164, gdesc[UR16], R24, gsb0 ;
        /*00a0*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR8][R8.64] ;
        /*00b0*/                   BRA.DIV UR4, `(.L_x_6) ;
        /*00c0*/                   BRA.U UP2, `(.L_x_1) ;
	//## File "/somewhere/kernel.py", line 7
        /*00d0*/                   STL [R1+0x50], R6 ;
        /*00e0*/              @!P2 BRA `(.L_x_0) ;
.L_x_9:
        /*00f0*/                   EXIT ;
.L_x_6:
        /*0100*/                   WARPSYNC.COLLECTIVE R15, `(.L_x_5) ;
.L_x_5:
        /*0110*/                   SHFL.BFLY P1, R14, R13, 0x1, 0x1f ;
        /*0120*/                   BRA `(.L_x_1) ;
.L_x_7:
        /*0130*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR19], R8 ;
        /*0140*/              @!P1 BRA `(.L_x_7) ;
        /*0150*/                   BRA `(.L_x_2) ;
.L_x_8:
        /*0160*/                   FADD R4, R4, R4 ;
        /*0170*/                   BSYNC B0 ;
.L_x_4:
        /*0180*/                   BRA `(.L_x_4);
"""

AMDGCN = """
	.text
kernel:                                 ; @kernel
.Lfunc_begin0:
	.loc	1 16 0                          ; kernel.py:16:0
; %bb.0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	.loc	2 263 15                        ; standard.py:263:15 @[ standard.py:293:36 @[ kernel.py:20:30 ] ]
	buffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_exp_f32_e32 v4, v4                    ; a comment
	scratch_store_dword off, v5, off
	s_cbranch_scc1 .LBB0_2
.LBB0_3:
	s_endpgm
.Lfunc_end0:
	.section	.rodata,"a",@progbits
	s_nop 0
"""


def opcodes(instructions: tuple[Instruction, ...]) -> list[str]:
    return [instruction.opcode.split(".")[0] for instruction in instructions]


def test_nested_loops_are_told_apart_and_unreachable_ones_left_out() -> None:
    loops = find_loops(parse_sass(SASS))
    assert [(loop.depth, opcodes(loop.instructions)) for loop in loops] == [
        (1, ["MUFU", "BSSY", "BRA", "BSYNC", "STL", "BRA", "FADD", "BSYNC"]),
        (2, ["SYNCS", "BRA", "HGMMA", "HGMMA", "LDGSTS", "BRA", "BRA", "BRA"]),
        (3, ["SYNCS", "BRA"]),
    ]


def test_instructions_are_counted_by_the_unit_that_executes_them() -> None:
    outer, inner, wait = (count(loop.instructions) for loop in find_loops(parse_sass(SASS)))
    assert outer == {"special": 1, "local": 1, "float": 1, "other": 5}
    assert inner == {"tensor": 2, "global": 1, "barrier": 1, "other": 4}
    assert wait == {"barrier": 1, "other": 1}


def test_instructions_know_the_lines_they_were_inlined_through() -> None:
    by_opcode = {instruction.opcode: instruction for instruction in parse_sass(SASS)}
    assert by_opcode["MUFU.EX2"].lines == ("kernel.py:5",)
    assert by_opcode["LDGSTS.E.BYPASS.128"].lines == ("helper.py:40", "kernel.py:6")
    assert by_opcode["STL"].text == "STL [R1+0x50], R6"


def test_amd_code_is_read_alike() -> None:
    instructions = parse_amdgcn(AMDGCN)
    assert len(instructions) == 8
    (loop,) = find_loops(instructions)
    assert count(loop.instructions) == {"global": 1, "tensor": 1, "special": 1, "local": 1, "other": 1}
    assert loop.instructions[0].lines == ("standard.py:263", "standard.py:293", "kernel.py:20")
    assert loop.instructions[2].text == "v_exp_f32_e32 v4, v4"


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32.BF16", "tensor"),
        ("UTCHMMA", "tensor"),
        ("UTCBAR", "barrier"),
        ("LD.E", "global"),
        ("LDC.64", "other"),
        ("LDG.E.128", "global"),
        ("LDGDEPBAR", "barrier"),
        ("LDS.128", "shared"),
        ("LDSM.16.M88.4", "shared"),
        ("LDL.LU", "local"),
        ("FMNMX3", "float"),
        ("FFMA2", "float"),
        ("F2FP.BF16.F32.PACK_AB", "float"),
        ("IMAD.MOV.U32", "other"),
        ("S2R", "other"),
        ("v_cvt_pk_bf16_f32", "float"),
        ("v_pk_mul_f32", "float"),
        ("v_max3_f32", "float"),
        ("v_cmp_o_f32_e32", "float"),
        ("v_add_u32_e32", "other"),
        ("ds_read_b64", "shared"),
        ("ds_bpermute_b32", "shuffle"),
        ("s_waitcnt", "barrier"),
    ],
)
def test_kind_of_an_instruction(opcode: str, kind: str) -> None:
    assert Instruction(opcode, opcode, (), (), None, True).kind == kind


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        ("LDG.E.128.CONSTANT", 16),
        ("LDG.E.U16", 2),
        ("STG.E", 4),
        ("LDGSTS.E.BYPASS.128", 16),
        ("UTMALDG.2D", 0),
        ("LDS.128", 0),
        ("global_load_dwordx4", 16),
        ("buffer_store_short", 2),
        ("global_load_ubyte", 1),
    ],
)
def test_bytes_that_a_thread_moves(opcode: str, width: int) -> None:
    assert Instruction(opcode, opcode, (), (), None, True).global_bytes == width


def test_what_is_never_executed_is_no_access() -> None:
    assert Instruction("LDS", "@!PT LDS RZ, [RZ]", (), (), None, True).kind == "other"


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared", "columns", "expected"),
    [
        ("sm_90", 8, 128, 48 << 10, 0, (2, "registers")),
        ("sm_90", 8, 129, 48 << 10, 0, (1, "registers")),  # 136 a thread leave 15 warps, three for each scheduler
        ("sm_90", 4, 168, 100 << 10, 0, (2, "shared memory")),
        ("sm_80", 4, 128, 81 << 10, 0, (2, "shared memory")),
        ("sm_80", 4, 128, 82 << 10, 0, (1, "shared memory")),
        ("sm_90", 4, 16, 0, 0, (16, "warps")),
        ("sm_90", 1, 16, 0, 0, (32, "blocks")),
        ("sm_90", 8, 255, 0, 0, (1, "registers")),
        ("sm_100", 4, 64, 0, 256, (2, "tensor memory")),
        ("gfx942", 4, 256, 0, 0, (2, "registers")),
        ("gfx942", 4, 257, 0, 0, (1, "registers")),
        ("gfx942", 4, 64, 33 << 10, 0, (1, "shared memory")),
    ],
)
def test_blocks_per_sm(
    architecture: str, warps: int, registers: int, shared: int, columns: int, expected: tuple[int, str]
) -> None:
    assert blocks_per_sm(LIMITS[architecture], warps, registers, shared, columns) == expected
