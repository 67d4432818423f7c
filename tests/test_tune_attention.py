"""The offline tuner of attention: what it prunes, times and writes, with a fake compiler and at toy size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import harness, static_gpu, tune_attention  # noqa: E402
from bench.harness import Sample  # noqa: E402
from bench.tune_attention import Log, Row, candidates  # noqa: E402
from star_kernels.attention import table  # noqa: E402
from star_kernels.attention.table import CONFIGURATIONS, Configuration  # noqa: E402

CPU, ROW = torch.device("cpu"), Row("sm_90", 2, 32)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log.jsonl")


@pytest.fixture(autouse=True)
def the_table_in_memory_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture, rows in CONFIGURATIONS.items():
        monkeypatch.setitem(CONFIGURATIONS, architecture, dict(rows))


@pytest.mark.parametrize("architecture", CONFIGURATIONS)
def test_every_row_of_the_table_is_among_its_candidates(architecture: str) -> None:
    for (itemsize, head_dim), configuration in CONFIGURATIONS[architecture].items():
        found = list(candidates(Row(architecture, itemsize, head_dim)))
        assert replace(configuration, max_registers=None) in [replace(c, max_registers=None) for c in found]
        assert len(found) == len(set(found)) < 150


def loop(tensor: dict[str, int], groups: int) -> SimpleNamespace:
    return SimpleNamespace(tensor=tensor, tensor_groups=groups)


GOOD = SimpleNamespace(blocks_per_sm=2, warps=8, spills=False, loops=[loop({"HGMMA.64x64x16": 8}, 2), loop({}, 0)])


@pytest.mark.parametrize(
    ("changes", "against"),
    [
        ({}, None),
        ({"spills": True}, "spills"),
        ({"blocks_per_sm": 0}, "does not fit"),
        ({"blocks_per_sm": 1, "warps": 4}, "too few warps"),
        ({"loops": [loop({"HMMA.16816": 8}, 0)]}, "no wgmma"),
        ({"loops": [loop({"HGMMA.64x64x16": 8}, 8)]}, "each wgmma is waited for"),
    ],
)
@pytest.mark.parametrize("only_with_capture", [False, True])
def test_what_the_static_report_shows_rules_a_candidate_out(
    changes: dict[str, Any], against: str | None, only_with_capture: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(operator: str, call: Any, architecture: str) -> SimpleNamespace:
        assert (operator, architecture) == ("attention", "sm_90")
        assert call.arguments["BLOCK_M"] == ROW.shipped.block_m
        bad = not only_with_capture or "units" in call.name
        return SimpleNamespace(**vars(GOOD) | (changes if bad else {}))

    monkeypatch.setattr(static_gpu, "report", report)
    assert tune_attention.examine(ROW, ROW.shipped)[1] == against


def test_of_candidates_alike_one_stays_for_each_number_of_blocks(log: Log) -> None:
    tile = Configuration(128, 64, 8, 3)
    for registers, found in ((None, (1, None)), (168, (1, None)), (128, (2, None))):
        log.add(f"static, {ROW}, {replace(tile, max_registers=registers)}", found)
    log.add(f"static, {ROW}, {Configuration(64, 64, 4, 3)}", (2, "spills"))
    assert tune_attention.survivors(ROW, log) == [tile, replace(tile, max_registers=128)]


def test_a_log_goes_on_where_it_was_cut_off_and_knows_its_sources(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    Log(path).add("a", 1.0)
    Log(path).add("b", [2, None])
    path.write_text(path.read_text() + '["cut o')
    log = Log(path)
    assert (log.get("a"), log.get("b"), log.get("c")) == (1.0, [2, None], None)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]).replace("Triton ", "Triton 1."))
    assert Log(path).get("a") is None


def test_processes_share_the_candidates_and_one_that_dies_costs_its_candidate_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fatal, rounds = tmp_path / "log.jsonl", Configuration(64, 64, 4, 3), []

    def apart(commands: Sequence[Sequence[str]], seconds: float) -> None:
        rounds.append(len(commands))
        for i in range(len(commands)):
            log = Log(path)
            for row, configuration in tune_attention.unexamined([ROW], log, i, len(commands)):
                if configuration == fatal:
                    break
                assert log.get(f"static, {row}, {configuration}") is None
                log.add(f"static, {row}, {configuration}", (1, None))

    monkeypatch.setattr(harness, "run_apart", apart)
    monkeypatch.setattr(harness, "default_device", lambda: CPU)
    assert tune_attention.main(["--architecture", "sm_90", "--itemsize", "2", "--head-dim", "32",
                                "--workers", "3", "--log", str(path)]) == 0  # fmt: skip
    log = Log(path)
    assert rounds == [3, 3]
    assert log.get(f"static, {ROW}, {fatal}") == [0, "crashes the compiler"]
    assert len(path.read_text().splitlines()) == len(list(candidates(ROW)))


class ScriptedClock:
    """What takes so long is decided by a function's name."""

    shortest_round = 0.0

    def __init__(self, seconds: Callable[[Any], float]) -> None:
        self.seconds, self.count = seconds, 0

    def sample(self, function: Callable[[], object], calls: int, host_seconds: float = 0.0) -> Sample:
        self.count += 1
        return Sample(self.seconds(function))

    def peak_bytes(self, function: Callable[[], object]) -> int:
        return 0


def test_the_best_over_all_cases_wins_and_nothing_is_timed_twice(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    even, uneven, bad = Configuration(64, 64, 4, 2), Configuration(128, 64, 8, 2), Configuration(64, 32, 4, 3)
    for configuration in (even, uneven, bad, ROW.shipped):
        log.add(f"static, {ROW}, {configuration}", (1, None))

    def launcher(row: Row, inputs: Any, image: int, capture: bool, configuration: Configuration) -> Any:
        def launch() -> None:
            pass

        launch.case = (configuration, image, capture)
        return configuration, launch

    def seconds(launch: Any) -> float:
        configuration, image, capture = launch.case
        if configuration == uneven:
            return 0.5 if image == 10 else 1.9
        return 0.8 if configuration == even else 1.0

    monkeypatch.setattr(tune_attention, "launcher", launcher)
    monkeypatch.setattr(tune_attention, "what_is_wrong", lambda launch, out, expected: "wrong" if out == bad else None)
    clock = ScriptedClock(seconds)
    for again in (False, True):
        before = clock.count
        tune_attention.time_row(ROW, log, clock, CPU, tune_attention.TOY_SIZES, 0.0)
        assert (clock.count == before) == again
        assert tune_attention.best(ROW, log, CPU) == (even, pytest.approx(0.8))


def test_wrong_results_and_errors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("out of resource: shared memory\nand so on")

    ones = torch.ones(3, dtype=torch.bfloat16)
    assert tune_attention.what_is_wrong(lambda: None, ones, ones) is None
    assert tune_attention.what_is_wrong(lambda: None, ones, 2 * ones) == "relative error 5.0e-01"
    assert tune_attention.what_is_wrong(lambda: None, ones * float("nan"), ones) == "relative error nan"
    assert tune_attention.what_is_wrong(fail, ones, ones) == "RuntimeError: out of resource: shared memory"


def test_a_table_is_tuned_at_toy_size_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    shutil.copy(table.PATH, path)
    before = json.loads(path.read_text())
    arguments = ["--toy", "--itemsize", "2", "--head-dim", "32", "--table", str(path)]
    for _ in range(2):  # the second time from the log
        assert tune_attention.main([*arguments, "--log", str(tmp_path / "log.jsonl")]) == 0
        tiles, choices = table.load(path)
        content = json.loads(path.read_text())
        assert [entry for entry in content["tiles"] if entry["source"] == before["tiles"][0]["source"]] == [
            entry for entry in before["tiles"] if (entry["architecture"], entry["itemsize"], entry["head_dim"])
            != ("sm_90", 2, 32)
        ]  # fmt: skip
        assert tiles["sm_90"][2, 32] in [ROW.shipped, *candidates(ROW)]
        assert choices["sm_90"][2, 32].keys() == {15, 29}
    (entry, _) = content["implementations"]
    faster = min(table.IMPLEMENTATIONS, key=lambda name: entry[f"{name}_ms"])
    assert entry["implementation"] == faster and harness.device_name(CPU) in entry["source"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune")
def test_without_a_gpu_it_says_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune_attention.main([])
    assert "--architecture" in capsys.readouterr().err
