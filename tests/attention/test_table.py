"""The table of tile sizes and implementations: what a file of it has to hold, and what is made of a device."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from star_kernels import backends
from star_kernels.attention import table

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NVIDIA = ("sm_80", "sm_90", "sm_100")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`gpu(name)`: as if the machine had a GPU of that architecture."""

    def pretend(name: str) -> None:
        forget()
        if name.startswith("gfx"):
            properties = type("Properties", (), {"gcnArchName": f"{name}:sramecc+:xnack-"})
            monkeypatch.setattr(torch.version, "hip", "7.0")
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        else:
            capability = int(name[3:-1]), int(name[-1])
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def forget() -> None:
        for cached in (table.name_of, table.architecture_of, backends.say_once):
            cached.cache_clear()

    yield pretend
    forget()


@pytest.mark.parametrize("name", [*NVIDIA, "gfx942"])
def test_an_architecture_of_the_table_is_taken_for_what_it_is(
    name: str, gpu: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    gpu(name)
    assert table.architecture_of(GPU) == name
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [("sm_86", "sm_80"), ("sm_120", "sm_80"), ("sm_103", "sm_100"), ("gfx950", "gfx942"), ("gfx1100", "gfx942")],
)
def test_another_architecture_is_named_in_one_warning(
    name: str, stand_in: str, gpu: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    gpu(name)
    with caplog.at_level(logging.WARNING, logger="star_kernels"):
        for index in range(2):
            assert table.architecture_of(torch.device("cuda", index)) == stand_in
    (record,) = caplog.records
    assert f"architecture {name} " in record.message and stand_in in record.message


def test_the_cpu_interprets_hoppers_kernels() -> None:
    assert table.architecture_of(CPU) == "sm_90"
    assert table.implementation_for(CPU, torch.float32, 64, 1229) == "fused"


def test_where_nothing_was_measured_pytorchs_attention_runs(
    gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "MEASURED", {"sm_80": {(2, 64): {1229: "fused"}}})
    for name in ("sm_90", "sm_86"):  # what was measured on a stand-in says nothing
        gpu(name)
        assert table.implementation_for(GPU, torch.bfloat16, 64, 1229) == "sdpa"
    gpu("sm_80")
    assert table.implementation_for(GPU, torch.float32, 64, 1229) == "sdpa"
    assert table.implementation_for(GPU, torch.float16, 40, 1229) == "fused"


@pytest.mark.parametrize(("num_keys", "expected"), [(1, "fused"), (1999, "fused"), (2001, "sdpa"), (10**6, "sdpa")])
def test_the_length_nearest_in_proportion_decides(
    num_keys: int, expected: str, gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("sm_90")
    monkeypatch.setattr(table, "MEASURED", {"sm_90": {(2, 128): {4000: "sdpa", 1000: "fused"}}})
    assert table.implementation_for(GPU, torch.bfloat16, 128, num_keys) == expected


def test_the_choice_compiles_once_for_the_lengths_that_share_it(
    gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("sm_90")
    monkeypatch.setattr(table, "MEASURED", {"sm_90": {(4, 32): {1000: "fused", 4000: "sdpa", 9000: "fused"}}})
    graphs: list[object] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def choose(tokens: torch.Tensor) -> torch.Tensor:
        chosen = table.implementation_for(GPU, tokens.dtype, tokens.shape[1], tokens.shape[0])
        return tokens.sum() * (0 if chosen == "fused" else 1)

    torch._dynamo.reset()
    compiled = torch.compile(choose, fullgraph=True, backend=keep, dynamic=True)
    for length, expected in [(30, 0), (1999, 0), (2001, 16), (5999, 16), (6001, 0), (9999, 0)]:
        assert compiled(torch.ones(length, 16)) == expected * length
    assert len(graphs) == 3


@pytest.mark.parametrize(("head_dim", "row"), [(8, 32), (33, 64), (64, 64), (96, 128), (128, 128)])
def test_a_head_dimension_takes_the_next_power_of_two(head_dim: int, row: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = table.CONFIGURATIONS["gfx942"][dtype.itemsize, row]
        assert table.configuration_for("gfx942", dtype, head_dim) is expected


MEASUREMENT = {
    "architecture": "sm_90",
    "itemsize": 2,
    "head_dim": 64,
    "num_keys": 1229,
    "implementation": "sdpa",
    "fused_ms": 0.2,
    "sdpa_ms": 0.1,
    "source": "a GPU",
}


def written(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The shipped table with one measurement, changed."""
    content = json.loads(table.PATH.read_text())
    content["implementations"] = [dict(MEASUREMENT)]
    change(content)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    return path


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["tiles"][0]["block_n"] = 32

    tiles, choices = table.load(written(tmp_path, change))
    assert tiles["sm_80"][2, 32] == table.Configuration(128, 32, 8, 3, 128)
    assert choices == {"sm_90": {(2, 64): {1229: "sdpa"}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("tiles"), "expected an object of 'tiles' and 'implementations'"),
        (lambda c: c.update(tiles={}), "tiles: expected a list, got {}"),
        (lambda c: c["tiles"][3].pop("source"), r"tiles\[3\]: expected the fields architecture, .*source, got"),
        (lambda c: c["tiles"][3].update(blokc_m=1), r"tiles\[3\]: expected the fields .* got .*blokc_m"),
        (lambda c: c["tiles"].append(3), r"tiles\[24\]: expected .* got 3"),
        (lambda c: c["tiles"][0].update(block_m="64"), r"tiles\[0\]: block_m: expected a positive int, got '64'"),
        (lambda c: c["tiles"][0].update(num_stages=0), r"tiles\[0\]: num_stages: expected a positive int, got 0"),
        (lambda c: c["tiles"][0].update(num_warps=True), r"num_warps: expected a positive int, got True"),
        (lambda c: c["tiles"][0].update(max_registers="128"), r"max_registers: expected a positive int or null, got"),
        (lambda c: c["tiles"][0].update(source=None), r"source: expected a string, got None"),
        (lambda c: c["tiles"][0].update(source=3), r"source: expected a string, got 3"),
        (lambda c: c["implementations"][0].update(sdpa_ms=1), r"sdpa_ms: expected a positive float, got 1"),
        (lambda c: c["tiles"][0].update(block_n=48), r"block_n: expected a power of two, got 48"),
        (lambda c: c["tiles"].append(c["tiles"][0]), r"tiles\[24\]: expected one entry of its kind, .* \(2, 32\)"),
        (lambda c: c["tiles"].pop(), r"gfx942 has no entry .* \{\(4, 128\)\}"),
        (lambda c: c["implementations"][0].update(implementation="flash"), r"implementations\[0\]: implementation: "),
        (lambda c: c["implementations"][0].update(sdpa_ms=float("nan")), r"sdpa_ms: expected a positive float"),
        (lambda c: c["implementations"].append(MEASUREMENT), r"implementations\[1\]: expected one .* for 1229"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        table.load(written(tmp_path, change))
    assert str(raised.value).startswith(str(tmp_path / "table.json"))


def test_what_is_no_file_of_json_is_named(tmp_path: Path) -> None:
    for content in (None, "{"):
        path = tmp_path / "table.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ValueError, match="expected a JSON file"):
            table.load(path)
