"""The benchmark harness where it computes: ratios, alternation, peak memory, results on disk, the picture."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from star_trainer.studies import timing

from bench import attention_cases, harness, latent_cases, plot
from bench.harness import CpuClock, CudaClock, Group, Measurement, Member, Sample
from star_kernels.attention import reference

ROOT = Path(__file__).parent.parent


class ScriptedClock:
    """Time by a script: calling a function costs what the machine's speed at that moment makes of it."""

    shortest_round = 0.0

    def __init__(self, speed: Callable[[int], float]) -> None:
        self.speed, self.calls, self.order = speed, 0, []

    def sample(self, function: Callable[[], object], calls: int, host_seconds: float = 0.0) -> Sample:
        cost = function()
        assert isinstance(cost, float)
        self.calls += 1
        self.order.append(cost)
        return Sample(cost * self.speed(self.calls))

    def peak_bytes(self, function: Callable[[], object]) -> int:
        return 1000


def two_members() -> list[Member]:
    return [Member("slow", lambda: 0.3, baseline=True), Member("fast", lambda: 0.1)]


def test_ratio_survives_a_machine_that_slows_down() -> None:
    # Four times slower in the middle of the run: medians of the whole run would compare different machines.
    clock = ScriptedClock(lambda calls: 4.0 if calls > 20 else 1.0)
    group = harness.measure(two_members(), clock, name="g", budget=8.0)
    ratio = group.ratio("fast")
    assert group.name == "g" and ratio is not None
    assert ratio.median == pytest.approx(1 / 3)
    assert group.ratio("slow") == harness.Spread(1.0, 1.0, 1.0, 1.0, 1.0)


def test_members_are_timed_in_turn_and_in_changing_order() -> None:
    clock = ScriptedClock(lambda _: 1.0)
    group = harness.measure(two_members(), clock, name="g", budget=8.0)
    rounds = clock.order[-2 * len(group["slow"].seconds) :]
    pairs = [tuple(rounds[i : i + 2]) for i in range(0, len(rounds), 2)]
    assert set(pairs) == {(0.3, 0.1), (0.1, 0.3)}
    assert harness.MIN_ROUNDS <= len(pairs) <= 8.0 / 0.4 + 1


def test_rounds_stay_within_their_limits() -> None:
    for cost, expected in ((100.0, harness.MIN_ROUNDS), (1e-9, harness.MAX_ROUNDS)):
        group = harness.measure([Member("m", lambda cost=cost: cost)], ScriptedClock(lambda _: 1.0), name="g")
        assert len(group["m"].seconds) == expected


def test_members_that_cannot_be_told_apart_are_refused() -> None:
    same = [Member("a", lambda: 0.1), Member("a", lambda: 0.1)]
    both = [Member("a", lambda: 0.1, baseline=True), Member("b", lambda: 0.1, baseline=True)]
    for members in (same, both, []):
        with pytest.raises(ValueError, match="expected members"):
            harness.measure(members, ScriptedClock(lambda _: 1.0), name="g")


def test_quartiles() -> None:
    assert harness.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == harness.Spread(3.0, 2.0, 4.0, 1.0, 5.0)
    assert harness.spread([7.0]) == harness.Spread(7.0, 7.0, 7.0, 7.0, 7.0)


@pytest.mark.parametrize("count", [6, 20, 101])
def test_the_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    generator = random.Random(0)
    spreads = [harness.spread([generator.random() for _ in range(count)]) for _ in range(2000)]
    assert 0.94 < sum(s.low <= 0.5 <= s.high for s in spreads) / 2000 < 0.99


def test_cpu_clock_repeats_and_divides() -> None:
    calls = []
    sample = CpuClock().sample(lambda: calls.append(torch.ones(10).sum()), 50)
    assert len(calls) == 50
    assert 0 < sample.seconds < 0.1 and sample.host_seconds is None


def test_cpu_peak_memory_counts_what_is_held_at_once() -> None:
    size = 2**18  # floats, 1 MiB

    def one_after_the_other() -> torch.Tensor:
        for _ in range(3):
            kept = torch.empty(size)
            del kept
        return torch.empty(size)

    def at_once() -> list[torch.Tensor]:
        return [torch.empty(size) for _ in range(3)]

    assert CpuClock().peak_bytes(one_after_the_other) == 4 * size
    assert CpuClock().peak_bytes(at_once) == 3 * 4 * size


class FakeGpu:
    """A GPU that computes in order what is queued, on a clock that the host shares; it spins at 2 GHz.

    `launch(seconds, host)` queues work of so many seconds, for which the host takes `host`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.busy_until = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.reached = max(gpu.now, gpu.busy_until)

            def query(self) -> bool:
                return gpu.now >= self.reached

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.reached)

            def elapsed_time(self, end: Event) -> float:
                return (end.reached - self.reached) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / 2e9, 0.0))
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(CudaClock, "FLUSH_BYTES", 16)
        monkeypatch.setattr(CudaClock, "peak_bytes", lambda clock, function: 0)
        self.clock = CudaClock(torch.device("cpu"))
        monkeypatch.setattr(self.clock, "_flush", SimpleNamespace(zero_=lambda: self.launch(1e-4, 0.0)))

    def launch(self, seconds: float, host: float) -> None:
        self.now += host
        self.busy_until = max(self.now, self.busy_until) + seconds

    def wait(self) -> None:
        self.now = max(self.now, self.busy_until)


@pytest.mark.parametrize("host", [1e-5, 1e-3, 0.04])
@pytest.mark.parametrize("device", [1e-6, 1e-3, 0.1])
def test_a_gpus_time_has_none_of_the_hosts_in_it(device: float, host: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)

    def call() -> None:
        for _ in range(10):
            gpu.launch(device / 10, host / 10)

    group = harness.measure([Member("m", call)], gpu.clock, name="g", budget=0.0)
    assert group["m"].median == pytest.approx(device)
    assert group["m"].host_seconds == pytest.approx(host)
    assert group["m"].ahead == 1.0
    (member,) = harness.group_as_dict(group)["members"]
    assert member["host_seconds"] == pytest.approx(host) and member["ahead"] == 1.0


@pytest.mark.parametrize("host", [1e-5, 0.06])
def test_a_call_that_waits_for_the_gpu_is_told(host: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)

    def call() -> None:
        gpu.launch(1e-5, host)
        gpu.wait()
        gpu.launch(1e-5, host)

    group = harness.measure([Member("m", call)], gpu.clock, name="g", budget=0.0)
    assert group["m"].ahead == 0.0
    assert group["m"].median >= host
    assert "not ahead" in harness.table([harness.group_as_dict(group)])[-1]


def test_the_cache_is_flushed_before_the_time_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(gpu.clock, "_flush", SimpleNamespace(zero_=lambda: log.append("flush")))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("spin"))
    record = torch.cuda.Event.record
    monkeypatch.setattr(torch.cuda.Event, "record", lambda event: (log.append("event"), record(event)))
    gpu.clock.sample(lambda: log.append("call"), 1)
    assert log == ["flush", "spin", "event", "call", "event"]


def measurement(name: str, seconds: tuple[float, ...], *arguments: Any) -> Measurement:
    return Measurement(name, tuple(map(Sample, seconds)), *arguments)


def example() -> list[dict[str, Any]]:
    groups = [
        Group(
            "with a baseline",
            (measurement("a", (1.0, 2.0, 4.0), 10), measurement("b", (0.5, 1.0, 2.0), 2_500_000, {"GB": 3.0})),
            baseline="a",
        ),
        Group("without", (measurement("only", (1e-5, 2e-5), 0),)),
    ]
    return [harness.group_as_dict(group) for group in groups]


def test_results_are_read_back_as_written_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    content = harness.results(example(), torch.device("cpu"), command="made up")
    harness.write_json(path, content)
    read = harness.load_results(path)
    assert read == content
    b = read["groups"][0]["members"][1]
    assert b == {
        "name": "b",
        "rounds": 3,
        "seconds": {"median": 1.0, "q1": 0.75, "q3": 1.5, "low": 0.5, "high": 2.0},
        "ratio": {"median": 0.5, "q1": 0.5, "q3": 0.5, "low": 0.5, "high": 0.5},
        "peak_bytes": 2_500_000,
        "rates": {"GB/s": 3.0},
        "host_seconds": None,
        "ahead": 1.0,
    }
    assert read["groups"][1]["members"][0]["ratio"] is None
    assert {"device", "torch", "triton", "threads", "commit"} <= read["environment"].keys()

    plot.main([str(path), "--out", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_tells_the_baseline_the_ratio_and_the_memory() -> None:
    header, name, a, b, *_ = harness.table(example())
    assert "time / baseline" in header
    assert name == "with a baseline"
    assert "a (baseline)" in a
    assert b.split()[:3] == ["b", "1", "s"]
    assert "0.500 [0.500, 0.500]" in b
    assert "2.00x" in b
    assert b.endswith("2.5 MB  3 GB/s")


def test_a_broken_file_is_refused_with_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    good = harness.results(example(), torch.device("cpu"), command="made up")

    def write(change: Callable[[dict], object]) -> None:
        content = json.loads(json.dumps(good))
        change(content)
        path.write_text(json.dumps(content))

    for change, message in (
        (lambda c: c.update(format=0), "format"),
        (lambda c: c["groups"][0].update(baseline="c"), "no member 'c'"),
        (lambda c: c["groups"][0]["members"][1].pop("peak_bytes"), "peak_bytes"),
        (lambda c: c["groups"][0]["members"][1]["ratio"].pop("q1"), "q1"),
    ):
        write(change)
        with pytest.raises(ValueError, match=message):
            harness.load_results(path)
    path.write_text("{")
    with pytest.raises(SystemExit):
        plot.main([str(path)])
    assert "expected a JSON file" in capsys.readouterr().err


def test_results_are_named_by_device_and_date(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    monkeypatch.setattr(harness, "device_name", lambda _: "NVIDIA H100 80GB (PCIe)")
    path = harness.results_path(torch.device("cpu"), datetime.date(2026, 1, 31))
    assert path == ROOT / "bench" / "results" / "nvidia_h100_80gb_pcie_2026-01-31.json"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_baselines_compute_what_they_stand_for(dtype: torch.dtype) -> None:
    shape = attention_cases.Shape("small", batch=2, heads=3, head_dim=16, image=20, text=9, units=4)
    inputs = attention_cases.make_inputs(shape, dtype, torch.device("cpu"))
    expected, mass, _ = reference.joint_attention(
        *(tensor.double() for tensor in inputs.qkv),
        inputs.unit_weights.double(),
        num_image_tokens=shape.image,
        text_first=False,
        scale=shape.head_dim**-0.5,
        rows=(0, shape.batch),
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for baseline in (attention_cases.text_column_pass, attention_cases.materialised):
        out, captured = baseline(inputs)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(captured.double(), mass, rtol=tolerance, atol=tolerance)
    members = attention_cases.members(inputs, "reference")
    results = {name: function() for name, function in members.items()}
    torch.testing.assert_close(results["SDPA, no capture"].double(), expected, rtol=tolerance, atol=tolerance)
    for implementation in ("fused", "sdpa"):
        assert results[f"{implementation}, no capture"][1] is None
        captured = results[f"{implementation}, capture"][1]
        torch.testing.assert_close(captured.double(), mass, rtol=tolerance, atol=tolerance)
    assert torch.equal(results["sdpa, capture"][0], results["SDPA, no capture"])


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "image"}, {"kl_and_guidance": True, "memory_format": torch.channels_last}],
    ids=["plain", "image", "everything"],
)
def test_baselines_on_latents_compute_what_they_stand_for(options: dict[str, Any]) -> None:
    case = latent_cases.make_case(3, 4, 8, torch.device("cpu"), **options)
    exact = latent_cases.in_float64(case)
    gradient = latent_cases.eager_loss(exact)()
    step, log_prob = latent_cases.eager_step(exact)(), latent_cases.eager_log_prob(exact)()
    assert gradient.dtype == log_prob.dtype == torch.float64 and gradient.any()
    for result, expected in (
        (latent_cases.eager_loss(case)(), gradient),
        (latent_cases.compiled_loss(case, "eager")(), gradient),
        (latent_cases.compiled_loss_and_gradient(case, "eager")(), gradient),
        (latent_cases.loss_and_backward(case, "auto"), gradient),
        *zip(latent_cases.compiled_step(case, "eager")(), step, strict=True),
        *zip(latent_cases.step(case, "auto"), step, strict=True),
        (latent_cases.compiled_log_prob(case, "eager")(), log_prob),
        (latent_cases.log_prob(case, "auto"), log_prob),
    ):
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.exhaustive
def test_pytest_bench_measures_a_group_and_tells_pytest_benchmark(tmp_path: Path) -> None:
    results, theirs = tmp_path / "results.json", tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/test_allocation_cost.py"]
    command += ["-k", "S-plain", "--results", str(results), f"--benchmark-json={theirs}"]
    # The variables of a pytest-xdist worker would make the new process one, which measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (group,) = harness.load_results(results)["groups"]
    assert [member["name"] for member in group["members"]] == ["eager", "fused"]
    assert group["baseline"] == "eager"
    assert "time / baseline" in done.stdout
    records = json.loads(theirs.read_text())["benchmarks"]
    assert {record["name"] for record in records} == {"eager", "fused"}
    assert len({record["fullname"] for record in records}) == 2
    for record, member in zip(records, group["members"], strict=True):
        assert record["stats"]["median"] == pytest.approx(member["seconds"]["median"])
        assert record["stats"]["rounds"] == member["rounds"]
        assert record["extra_info"]["peak_bytes"] == member["peak_bytes"]
