"""The one-command GPU run at toy size: every part runs here, so that its first minute on a GPU is not its first."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gpu, gpu_attention, gpu_latents, gpu_tests, harness
from bench.gpu_report import Rehearsal, Report, relative_error


def run(tmp_path: Path, *arguments: str, backend: str = "auto") -> tuple[int, dict[str, Any]]:
    out = tmp_path / "results.json"
    code = gpu.main(["--toy", "--backend", backend, "--out", str(out), *arguments])
    return code, harness.load_results(out)


def make_report(tmp_path: Path, seconds: float = 60.0) -> Report:
    deadline = time.monotonic() + seconds
    return Report("made up", tmp_path / "part.json", torch.device("cpu"), toy=True, backend="auto", deadline=deadline)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return make_report(tmp_path)


@pytest.mark.exhaustive
def test_every_part_runs_and_every_check_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # However busy the machine is.
    code, content = run(tmp_path, "--in-process", "--budget", "3600", backend="triton")
    shown = capsys.readouterr().out
    assert code == 0, shown
    groups, parts = content["groups"], content["parts"]
    assert list(parts) == ["attention correctness", "attention speed", "latents", "tests", "model"]
    assert {part["status"] for part in parts.values()} == {"ok"}
    assert len(parts["attention correctness"]["checks"]) > 200
    assert len(parts["latents"]["checks"]) > 10
    for kind in ("forward, S", "backward, S", "mass, S", "loss", "transition", "allocation", "rollout", "update"):
        assert any(kind in group["name"] for group in groups), kind
    forward = next(group for group in groups if "forward, S" in group["name"])
    assert forward["baseline"].startswith("SDPA ")
    assert all(member["rates"]["TFLOP/s"] > 0 for member in forward["members"])
    for implementation in gpu_attention.IMPLEMENTATIONS:
        assert any(member["name"].startswith(f"{implementation}, K") for member in forward["members"])
    assert "time / baseline" in shown


@pytest.mark.exhaustive
def test_parts_in_processes_of_their_own_hand_their_findings_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, content = run(tmp_path, "--sections", "tests", "--budget", "3600")
    shown = capfd.readouterr().out
    assert code == 0, shown
    (check,) = content["parts"]["tests"]["checks"]
    assert check["what"].endswith("_triton.py") and check["claim"] == "1 passed"


@pytest.mark.exhaustive
def test_processes_rehearse_what_there_is_to_compile(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = gpu.parse(["--toy", "--backend", "auto", "--out", str(tmp_path / "results.json")])
    gpu.rehearse(["latents"], options, 3600.0)
    shown = capfd.readouterr()
    assert not list(tmp_path.iterdir())
    assert "FAILED" not in shown.out and "ended with code" not in shown.out, shown


def test_what_fails_is_kept_with_its_traceback_and_the_rest_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("made to fail")

    monkeypatch.setitem(gpu.SECTIONS, "operators", {"attention speed": 1.0, "latents": 1.0})
    monkeypatch.setattr(gpu_attention, "speed", broken)
    monkeypatch.setattr(gpu_latents, "_check_loss", broken)
    for part in ("_time_loss", "_time_step"):
        monkeypatch.setattr(gpu_latents, part, lambda *_: None)
    code, content = run(tmp_path, "--in-process", "--sections", "operators")
    assert code == 1
    speed, latents = content["parts"]["attention speed"], content["parts"]["latents"]
    assert "made to fail" in speed["failures"][0]["traceback"]
    assert "made to fail" in latents["failures"][0]["traceback"]
    assert any("transition" in check["what"] for check in latents["checks"])
    assert ["allocation map" in group["name"] for group in content["groups"]] == [True]
    assert "FAILED: the whole part" in capsys.readouterr().out


def test_a_process_that_dies_or_hangs_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    report.check("kept", 0.0, 1.0)
    apart = harness.run_apart

    def die(commands: Sequence[Sequence[str]], seconds: float) -> None:
        assert all("--parts" in command for command in commands)
        rehearsal = "--rehearse" in commands[0]
        assert "tests" not in commands[0] or not rehearsal
        if not rehearsal:
            Path(commands[0][commands[0].index("--out") + 1]).write_text(report.path.read_text())
            apart([[sys.executable, "-c", "import os; os.abort()"]], seconds)

    monkeypatch.setattr(harness, "run_apart", die)
    code, content = run(tmp_path, "--sections", "tests", "model")
    assert code == 1
    for part in content["parts"].values():
        assert part["status"] == "cut off"
        assert part["checks"][0]["what"] == "kept"

    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    grandchild = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    apart([[sys.executable, "-c", child, grandchild, str(tmp_path / "pid")], [sys.executable, "-c", ""]], 2.0)
    assert "killed after" in capsys.readouterr().out
    state, soon = Path("/proc", (tmp_path / "pid").read_text(), "stat"), time.monotonic() + 20
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < soon, "what it had started lives on"


def test_what_there_is_no_time_for_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, content = run(tmp_path, "--in-process", "--sections", "operators", "--budget", "0")
    assert code == 1
    assert all(part["no_time"] and part["status"] == "failed" for part in content["parts"].values())
    assert "NO TIME: S, bfloat16, fused" in capsys.readouterr().out
    report = make_report(tmp_path, seconds=0)
    assert not report.guard("too late", lambda: pytest.fail("it ran"))
    report.finish()
    assert not report.ok and report.no_time == ["too late"]


def test_a_report_tells_good_from_bad(report: Report) -> None:
    report.check("within", 1e-6, 1e-5)
    assert not report.ok
    report.finish()
    assert report.ok
    report.check("not a number", math.nan, 1e-5)
    report.check_equal("the same", torch.ones(2), torch.zeros(2))
    assert not report.ok
    part = json.loads(report.path.read_text())
    assert part["status"] == "failed"
    assert [check["ok"] for check in part["checks"]] == [True, False, False]
    assert part["checks"][1]["error"] is None


def test_memory_that_does_not_suffice_fails_what_is_ours_and_leaves_out_what_is_not(report: Report) -> None:
    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand so on")

    assert report.available("g", {"theirs": too_much, "small": lambda: None}).keys() == {"small"}
    report.finish()
    assert report.left_out == [{"what": "g: theirs", "reason": "CUDA out of memory. Tried to allocate"}]
    assert report.ok
    group = report.measure("g", [harness.Member("ours", too_much), harness.Member("small", lambda: None)])
    assert group is not None and [measurement.name for measurement in group.measurements] == ["small"]
    assert not report.ok


def test_a_rehearsal_runs_everything_once_over_its_processes_and_keeps_nothing(tmp_path: Path) -> None:
    ran: list[str] = []

    def part(report: Report) -> None:
        for name in map(str, range(20)):
            report.guard(name, lambda name=name: report.measure(name, [harness.Member("m", lambda: ran.append(name))]))

    for i in range(3):
        path = tmp_path / f"{i}.json"
        rehearsal = Rehearsal("made up", path, torch.device("cpu"), True, "auto", time.monotonic() + 60, share=(i, 3))
        before = len(ran)
        part(rehearsal)
        rehearsal.check("not looked at", 1.0, 0.0)
        rehearsal.finish()
        assert len(ran) > before and rehearsal.ok and not path.exists()
    assert sorted(ran) == sorted(map(str, range(20)))


@pytest.mark.parametrize(
    ("outcomes", "claim", "ok"),
    [
        (["PASSED     [ 50%]", "PASSED     [100%]"], "2 passed", True),
        (["PASSED", "SKIPPED (no such thing)"], "1 passed, 1 skipped", True),
        (["SKIPPED (all)", "SKIPPED (all)"], "2 skipped", False),
        (["PASSED", "FAILED"], "1 passed, 1 failed", False),
        (["PASSED", "and then it hung"], "1 passed, 1 not run", False),
    ],
)
def test_tests_that_fail_or_do_not_run_are_told(
    outcomes: list[str], claim: str, ok: bool, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    names = ["tests/a/test_a_triton.py::test_one[unit weights]", "tests/a/test_a_triton.py::test_two"]

    def apart(commands: Sequence[Sequence[str]], seconds: float, logs: Sequence[Path]) -> None:
        assert sorted(name for command in commands for name in command if "::" in name) == names
        lines = [f"{name} {outcome}\n" for name, outcome in zip(names, outcomes, strict=True)]
        for path in logs:
            path.write_text("".join(lines))
        if "FAILED" in outcomes:
            logs[0].write_text("".join(lines) + "=== FAILURES ===\nwhy\n")

    listed = SimpleNamespace(stdout="\n".join([*names, "", "2 tests collected"]))
    monkeypatch.setattr(gpu_tests.subprocess, "run", lambda *_, **__: listed)
    monkeypatch.setattr(harness, "run_apart", apart)
    gpu_tests.run(report)
    (check,) = report.checks
    assert (check["what"], check["claim"], check["ok"]) == ("tests/a/test_a_triton.py", claim, ok)
    assert ["why" in failure["traceback"] for failure in report.failures] == [True] * ("FAILED" in outcomes)


def test_every_operator_with_a_triton_kernel_is_among_the_tests(
    monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    """On a GPU. Of the mass beside any attention, whose tests are not in a file of Triton's own, too."""
    asked: list[str] = []

    def apart(commands: Sequence[Sequence[str]], seconds: float, logs: Sequence[Path]) -> None:
        asked.extend(name for command in commands for name in command if "::" in name)
        for path in logs:
            path.touch()

    monkeypatch.setattr(report, "toy", False)
    monkeypatch.setattr(harness, "run_apart", apart)
    gpu_tests.run(report)
    tested = {name.split("::")[0].split("/")[-1].removesuffix("_triton.py") for name in asked}
    assert tested == {
        "test_allocation_map",
        "test_attention_mass.py",
        "test_joint_attention",
        "test_policy_loss",
        "test_transition",
    }
    assert all("triton" in name for name in asked)


@pytest.mark.parametrize("with_log_sum_exp", [False, True])
@pytest.mark.parametrize(
    ("name", "modules"),
    [("FlashAttention 3", ["flash_attn_interface"]), ("FlashAttention 4", ["flash_attn", "flash_attn.cute"])],
)
def test_flash_attention_of_a_package_is_a_baseline_where_it_is_installed(
    name: str, modules: list[str], with_log_sum_exp: bool, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    query, key, value = torch.randn(3, 2, 3, 5, 8)
    baseline = {name: gpu_attention.BASELINES[name]}
    assert report.available("before", baseline, query, key, value) == {}

    def flash_attn_func(*tensors: torch.Tensor) -> object:
        out = gpu_attention.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in tensors))
        return (out.transpose(1, 2), None) if with_log_sum_exp else out.transpose(1, 2)

    for module in modules:
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=flash_attn_func))
    found = report.available("after", baseline, query, key, value)
    expected = gpu_attention.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found[name](query, key, value), expected)


def wrong(right: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: gpu_attention.Call, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, mass = right(self, **options)
        if "implementation" not in options:  # the definition
            return out, mass
        return out * 1.02, None if mass is None else mass * 1.01

    return call


def test_wrong_kernels_do_not_pass(monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    monkeypatch.setattr(gpu_attention.Call, "__call__", wrong(gpu_attention.Call.__call__))
    shape = gpu_attention.shapes(report)[0]
    gpu_attention._check(report, shape, torch.bfloat16, "fused", "S")
    bad = {check["what"] for check in report.checks if not check["ok"]}
    for use in ("capture", "no capture", "text lengths", "text to image", "cross-attention"):
        assert f"S, {use}, sample 1, output" in bad
        assert (f"S, {use}, sample 1, mass" in bad) == (use != "no capture")
    assert not any("alone" in what or "second" in what for what in bad)


@pytest.mark.exhaustive
def test_nothing_but_torch_triton_and_numpy_has_to_be_installed() -> None:
    lacking = ("accelerate", "diffusers", "matplotlib", "peft", "pydantic", "pytest", "safetensors", "transformers")
    parts = "gpu, gpu_attention, gpu_latents, gpu_model, gpu_tests, tune_attention"
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking})); from bench import {parts}"
    paths = os.pathsep.join(map(str, (harness.ROOT, harness.ROOT / "python")))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=120)


def test_relative_error_sees_a_nan() -> None:
    assert relative_error(torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0])) == pytest.approx(0.05)
    assert math.isnan(relative_error(torch.tensor([math.nan, 2.0]), torch.tensor([1.0, 2.0])))
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


def test_without_a_gpu_full_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--toy" in capsys.readouterr().err
