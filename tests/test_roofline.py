"""Floors of the kernels: counted by hand here, by the shapes' formulas there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.attention_cases import sd35_medium
from bench.roofline import (
    H100,
    Latents,
    attainable,
    attention,
    attention_mass,
    cycles_table,
    loop_cycles,
    mass_microseconds,
    mass_table,
    mean_over_heads,
    policy_loss,
    traffic_table,
    work_table,
)
from bench.static_gpu import KernelReport, LoopReport

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
SMALL = sd35_medium("S", batch=8)  # 24 heads of 64, 1024 + 205 tokens, 8 units


def test_the_clock_is_the_one_that_the_data_sheet_implies() -> None:
    assert pytest.approx(1.83e9, rel=1e-3) == H100.clock
    assert pytest.approx(132 * 16 * 1.83e9, rel=1e-3) == H100.exponentials_per_second


def test_attention_counts_both_products_and_one_exponential_per_pair() -> None:
    work = attention(SMALL, capture=False)
    assert work.tensor_operations == 2 * 2 * 8 * 24 * 1229 * 1229 * 64
    assert work.exponentials == 8 * 24 * 1229 * 1229
    query = 8 * 24 * 1229 * 64 * 2
    assert work.bytes == 4 * query + 8 * 24 * 1229 * 4


def test_capture_adds_one_narrow_product_over_text_and_a_mass_per_head() -> None:
    plain, capturing = attention(SMALL, capture=False), attention(SMALL, capture=True)
    assert capturing.tensor_operations - plain.tensor_operations == 2 * 8 * 24 * 1024 * 205 * 16
    assert capturing.bytes - plain.bytes == 8 * 205 * 8 * 4 + 8 * 24 * 1024 * 8 * 4
    assert capturing.exponentials == plain.exponentials
    assert mean_over_heads(SMALL).bytes == 8 * 1024 * 8 * 4 * 25


def test_the_mass_looks_at_image_rows_and_text_columns() -> None:
    work = attention_mass(SMALL)
    assert work.exponentials == 8 * 24 * 1024 * 205
    assert work.tensor_operations == 2 * 8 * 24 * 1024 * 205 * (64 + 16)
    assert work.bytes == 2 * 8 * 24 * 1229 * 64 + 4 * 8 * 24 * 1024 + 4 * 8 * 1229 * 8


def test_policy_loss_reads_each_tensor_once_and_writes_one_gradient() -> None:
    latents, positions = 9 * 16 * 64 * 64, 9 * 64 * 64
    # velocity and gradient in bfloat16, both samples in float32; log-probs and the weights of 32 x 32 tokens
    assert policy_loss(Latents(9)).bytes == latents * (2 + 2 + 4 + 4) + 4 * positions + 4 * positions // 4


def test_floor_is_the_time_of_the_busiest_resource() -> None:
    seconds = attention(SMALL, capture=False).seconds(H100)
    assert seconds["tensor cores"] == pytest.approx(74.24e9 / 989.5e12, rel=1e-3)
    assert seconds["memory"] == pytest.approx(121.8e6 / 3.35e12, rel=1e-3)
    # At head dim 64 a pair costs 256 operations of 4096 per cycle and one exponential of 16.
    assert seconds["exponentials"] == pytest.approx(seconds["tensor cores"])


def test_cycles_of_a_tile_follow_from_its_instructions() -> None:
    # 128 queries x 64 keys at head dim 64 by two warp groups: each 64 x 64 x 64 is four instructions, of two products.
    loop = LoopReport("image keys", 1, 312, {"special": 34}, {"HGMMA.64x64x16.F32.BF16": 8}, 2, 0)
    kernel = KernelReport("", "forward", "sm_90", "", {}, 1, 0, 8, 3, 128, 0, 0, 0, 0, 2, "", 0, {}, {}, 0, [loop])
    cycles = loop_cycles(kernel, loop, H100)
    assert cycles == {"tensor cores": 4 * 128 * 64 * 64 / 4096, "exponentials": 34 * 8 * 32 / 16, "issue": 312 * 8 / 4}
    side_by_side, taking_turns = attainable(cycles, H100)
    assert side_by_side == pytest.approx(989.5e12 * 512 / 624)
    assert taking_turns == pytest.approx(989.5e12 * 512 / (512 + 624))
    row = ("forward", "2", "312", "512", "544", "624", "812 TFLOP/s", "446 TFLOP/s")
    assert cycles_table([kernel, replace(kernel, architecture="sm_80")], H100)[1:] == [row]


def test_the_mass_takes_as_long_as_the_busiest_sm() -> None:
    # Heads in threes: 512 programs, four on some SM, each with three times seven tiles of 128 x 32 pairs, 64 deep. The
    # columns of two products, 32 and 16, are as wide as the instructions.
    opcodes = {"HGMMA.64x32x16.F32.BF16": 8, "HGMMA.64x16x16.F32.BF16": 4}
    loops = [LoopReport("heads", 1, 100, {}, {}, 0, 0), LoopReport("text", 2, 300, {"special": 32}, opcodes, 3, 0)]
    settings = {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP": 3}
    name = "mass from log-sum-exp, image to text, bfloat16, head dim 64, 8 units"
    sizes = (settings, 512, 0, 4, 2, 116, 0, 0, 0, 0, 4, "registers", 400)
    kernel = KernelReport("attention", name, "sm_90", "", *sizes, {}, {}, 0, loops)
    slots = 4 * 8 * 1024 * 8 * (8 + 1) / 3.35e12
    side_by_side, taking_turns = mass_microseconds(kernel, SMALL, H100)
    tensor = 2 * 128 * 32 * (64 + 16) / 4096
    assert side_by_side == pytest.approx(1e6 * (4 * 3 * (7 * 300 + 100) / H100.clock + slots))
    assert taking_turns == pytest.approx(1e6 * (4 * 3 * (7 * (300 + tensor) + 100) / H100.clock + slots))
    assert [row[1] for row in mass_table([kernel], H100)[1:]] == ["S", "L"]
    others = [replace(kernel, architecture="sm_80"), replace(kernel, name="forward, bfloat16, head dim 64, 8 units")]
    assert len(mass_table(others, H100)) == 1


def test_traffic_counts_every_iteration_of_every_thread() -> None:
    # 264 programs of 4 warps, two for each SM: 8 bytes a thread and 50 instructions in each of three iterations, and
    # 4 bytes and 30 instructions after them.
    loop = LoopReport("heads", 1, 50, {}, {}, 0, 8)
    sizes = (264, 5 * 264 * 128, 4, 3, 30, 0, 0, 0, 0, 16, "warps", 80)
    kernel = KernelReport("attention", "mean over heads", "sm_90", "", {}, *sizes, {}, {}, 12, [loop])
    _, row = traffic_table([kernel], H100)
    assert row[:5] == ("attention: mean over heads", "264", "0.17 MB", "0.95 MB", "5.60")
    assert row[6] == f"{2 * 4 * (3 * 50 + 30) / 4 / H100.clock * 1e6:.2f} µs"


def test_the_floors_on_the_page_are_those_of_the_formulas() -> None:
    head, *computed = work_table(H100)
    expected = {row[0]: dict(zip(head, row, strict=True)) for row in computed}
    lines = PAGE.read_text().partition("| call | memory |")[2].partition("\n\n")[0].splitlines()
    columns, _, *rows = (cells(line) for line in lines)
    assert len(rows) >= 8
    for call, *shown in rows:
        assert shown == [expected[call][column] for column in ("memory", *columns)], call


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]
