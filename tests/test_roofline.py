"""Floors of the kernels: counted by hand here, by the shapes' formulas there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.attention_cases import sd35_medium
from bench.roofline import (
    H100,
    STATIC_REPORT,
    Latents,
    attainable,
    attention,
    loop_cycles,
    mean_over_heads,
    policy_loss,
    text_to_image,
    traffic_table,
    with_tables,
)
from bench.static_gpu import LIMITS, OPERATORS, KernelReport, LoopReport, calls, load, settings

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


def test_text_to_image_looks_at_text_rows_and_image_columns() -> None:
    work = text_to_image(SMALL)
    assert work.exponentials == 8 * 24 * 205 * 1024
    assert work.tensor_operations == 2 * 8 * 24 * 205 * 1024 * (64 + 16)


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
    kernel = KernelReport("", "", "sm_90", "", {}, 1, 0, 8, 3, 128, 0, 0, 0, 0, 2, "", 0, {}, {}, 0, [loop])
    cycles = loop_cycles(kernel, loop, H100)
    assert cycles == {"tensor cores": 4 * 128 * 64 * 64 / 4096, "exponentials": 34 * 8 * 32 / 16, "issue": 312 * 8 / 4}
    side_by_side, taking_turns = attainable(cycles, H100)
    assert side_by_side == pytest.approx(989.5e12 * 512 / 624)
    assert taking_turns == pytest.approx(989.5e12 * 512 / (512 + 624))


def test_traffic_counts_every_iteration_of_every_thread() -> None:
    # 264 programs of 4 warps, two for each SM: 8 bytes a thread and 50 instructions in each of three iterations, and
    # 4 bytes and 30 instructions after them.
    loop = LoopReport("heads", 1, 50, {}, {}, 0, 8)
    sizes = (264, 5 * 264 * 128, 4, 3, 30, 0, 0, 0, 0, 16, "warps", 80)
    kernel = KernelReport("attention", "mean over heads", "sm_90", "", {}, *sizes, {}, {}, 12, [loop])
    _, row = traffic_table([kernel], H100)
    assert row[:5] == ("attention: mean over heads", "264", "0.17 MB", "0.95 MB", "5.60")
    assert row[6] == f"{2 * 4 * (3 * 50 + 30) / 4 / H100.clock * 1e6:.2f} µs"


def test_the_page_shows_the_tables_of_the_committed_report() -> None:
    page = PAGE.read_text()
    assert page.count("<!-- table: ") == 5
    assert page == with_tables(page), "python -m bench.roofline --page docs/kernels.md brings the page up to date"


def test_the_committed_report_is_of_the_configurations_in_the_code() -> None:
    pytest.importorskip("triton")
    reported = {(kernel.architecture, kernel.operator, kernel.name): kernel.settings for kernel in load(STATIC_REPORT)}
    assert reported == {
        (architecture, operator, call.name): json.loads(json.dumps(settings(call)))
        for architecture in LIMITS
        for operator, call in calls(OPERATORS, architecture)
    }, "python -m bench.static_gpu --json bench/results/static_gpu.json compiles everything anew"
